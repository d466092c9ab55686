"""The longest sequence of which a Hugging Face model's gradient fits into a budget, by the planner.

    python -m benchmarks.hf_longest [--memory 4GiB]      # half an hour on one core; writes results/hf_longest.json

Shapes of `benchmarks.huggingface`, in float32, each in a process of its own whose malloc returns large blocks.
What chunks take is measured on a sequence that is long enough; of longer ones it is computed, and the smallest way to
go about them compared with the budget. Of plain backpropagation and per-layer checkpointing the memory is a straight
line through the two lengths of results/huggingface.json, above the process with the model in it, so theirs are about
right, and a little long where attention grows faster.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.huggingface import Case
from benchmarks.measure import RESULTS, save
from slimgrad.budget import available
from slimgrad.budget.choose import Chooser, Way, Work
from slimgrad.budget.measure import call_in_child
from slimgrad.budget.planning import chooser_for
from slimgrad.budget.process import resident_bytes
from slimgrad.budget.size import parse_bytes
from slimgrad.errors import RunError

SHAPES = ("llama-100M", "qwen3.5-100M", "mamba2-100M")
OURS, OTHERS = ("ours", "ours+checkpointing"), ("plain", "checkpointing")
PROBED = 4096  # tokens
MOST = 1 << 24


def measure(shape: str, method: str, memory: int) -> dict[str, Any]:
    """The child's side."""
    import slimgrad as sg
    from slimgrad.hf.base import BaseForward

    torch.set_num_threads(1)
    available.set_malloc("returned")
    model = Case(shape=shape, method=method, length=0).build()
    built = resident_bytes()
    sg.hf.enable(model, memory=memory)
    (base,) = [m.forward for m in model.modules() if isinstance(vars(m).get("forward"), BaseForward)]

    def asked(length: int) -> Any:
        return base.request([{"input_ids": torch.zeros(1, length, dtype=torch.long)}])

    plan, chooser = chooser_for(asked(PROBED), 1 << 50)
    gradients = sum(p.nbytes for p in model.parameters())
    held = plan.account["weights"] + plan.account["everything else that was there"]

    def smallest(length: int) -> Way:
        return Chooser(chooser.costs, Work((length,), at_once=True, to_end=True), chooser.slack).smallest()

    def needs(length: int) -> int:
        return held + sum(asked(length).reserved.values()) + smallest(length).num_bytes

    low, high = 1, MOST
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= memory else (low, middle)
    way = smallest(low)
    account = {name: num_bytes for name, num_bytes in way.account.items() if num_bytes}
    return {
        "longest": low, "chunk": way.chunk, "held_bytes": held, "built_bytes": built, "account": account,
        "gradient_bytes": gradients,
    }  # fmt: skip


def by_a_line(rows: list[dict[str, Any]], shape: str, method: str, memory: int, held: int) -> int | None:
    """Where the straight line through the measured peaks of a method meets the budget. `held`: weights included."""
    own = [r for r in rows if (r["shape"], r["method"], r["vocabulary"]) == (shape, method, 0) and "failed" not in r]
    points = sorted((r["length"], r["peak_bytes_above"], r["gradient_bytes"]) for r in own)
    if len(points) < 2:
        return None
    (x1, y1, g), (x2, y2, _) = points[0], points[-1]
    return int(x1 + (memory - held - g - y1) * (x2 - x1) / (y2 - y1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="4GiB")
    memory = parse_bytes(parser.parse_args().memory)
    path = RESULTS / "hf_longest.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    measured = json.loads((RESULTS / "huggingface.json").read_text())["rows"]
    for shape in SHAPES:
        for method in OURS:
            task = {"shape": shape, "method": method, "memory": memory}
            if not any(all(row.get(name) == value for name, value in task.items()) for row in rows):
                try:
                    rows.append(task | call_in_child("benchmarks.hf_longest:measure", task))
                except RunError as error:
                    rows.append(task | {"failed": str(error)[:300]})
                print(rows[-1], flush=True)
            held = max((row.get("built_bytes", 0) for row in rows if row["shape"] == shape), default=0)
            rows = [row for row in rows if row["shape"] != shape or row["method"] not in OTHERS]
            for other in OTHERS:
                found = by_a_line(measured, shape, other, memory, held) if held else None
                rows.append({"shape": shape, "method": other, "memory": memory, "longest": found})
            save("hf_longest", rows)


if __name__ == "__main__":
    main()
