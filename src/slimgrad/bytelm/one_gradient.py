"""The child process of `memory.measure_gradient`: one gradient, and what it took, as one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from slimgrad.api import backward
from slimgrad.bytelm.memory import PROC, Cost, Method, max_resident_bytes, proc_status
from slimgrad.models.performer import Performer, PerformerConfig

_WARM_UP_BYTES = 64


def measure(task: dict[str, Any]) -> Cost:
    """Do the task that `memory.measure_gradient` describes."""
    torch.set_num_threads(task["threads"])
    model = Performer(PerformerConfig(**task["model"]))
    tokens = torch.randint(256, (1, task["length"]), dtype=torch.uint8)
    _gradient(model, tokens[:, :_WARM_UP_BYTES], chunk=_WARM_UP_BYTES // 2, method=task["method"])
    with suppress(OSError):
        (PROC / "clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = proc_status("VmRSS") or max_resident_bytes()
    began = perf_counter()
    _gradient(model, tokens, chunk=task["chunk"], method=task["method"])
    seconds = perf_counter() - began
    after = proc_status("VmHWM") or max_resident_bytes()
    if before is None or after is None:
        return Cost(peak_bytes=None, seconds=seconds, note="not measured on this platform")
    return Cost(peak_bytes=max(after - before, 0), seconds=seconds)


def _gradient(model: Performer, tokens: torch.Tensor, *, chunk: int, method: Method) -> None:
    if method == "slimgrad":
        backward(model, tokens, chunk=chunk)
        return
    logits, _ = model(tokens[:, :-1], model.initial_state(1))
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long()).backward()


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(json.load(sys.stdin)))))
