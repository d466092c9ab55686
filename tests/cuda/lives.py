"""A life of a segment, killed on its way: `python -m tests.cuda.lives <folder> <kind> <schedule> <store> <after>`.

With 0 it goes on to the end and writes what it came to.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import slimgrad as sg
from tests.call import segments
from tests.cuda.device import DEVICE, SCHEDULES, moved, place_toys

SAVED_EVERY = 2


def built(kind: str) -> torch.nn.Module:
    return segments.built(kind).to(DEVICE)


def begun(kind: str, schedule: str, store: str) -> sg.Segment:
    options = {"chunk": segments.CHUNK, "schedule": SCHEDULES[schedule](store=store, rows=store)}
    model = built(kind)
    torch.manual_seed(5)
    return sg.Segment(model, moved(segments.TOKENS), loss_fn=segments.counted, **options)


def result_of(one: sg.Segment) -> dict[str, Any]:
    return segments.bits(one._call.model, segments.finished(one))


def live(folder: Path, kind: str, schedule: str, store: str, kill_after: int) -> None:
    count, saved = 0, folder / "saved"

    def on_chunk(_: sg.Event) -> None:
        nonlocal count
        count += 1
        if count % SAVED_EVERY == 0:
            one.save(saved)
        if count == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    if (saved / "segment.json").exists():
        one = sg.Segment.load(saved, built(kind), moved(segments.TOKENS), loss_fn=segments.counted)
    else:
        one = begun(kind, schedule, store)
    one.on_chunk = on_chunk
    torch.save(result_of(one), folder / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    place_toys(pytest.MonkeyPatch())
    live(Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]))
