"""One exact gradient over a sequence that nobody holds: up to 10^8 tokens, which a reader computes span by span.

    nice python -m benchmarks.stream             # a quarter of an hour on one core; writes results/stream.json
    python -m benchmarks.stream --quick          # 10^5 and 10^6 tokens only

The model is a small one, or nobody would wait: one layer of linear attention with two features, 16 tokens, 124 weights
(`Tiny`). What grows with the length is the sweep's own, and the same for any model: so many bytes for each chunk.

Every figure comes from a process of its own, with a gradient of its own: for each length its time and resident memory
(above what two chunks leave behind; under glibc's default malloc, and with every block of 64 KiB or more mapped on its
own) and the bytes of its tensors; and in many short chunks the bytes that each leaves behind, in Python's objects
(tracemalloc, by file) and in tensors.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from benchmarks.measure import LiveBytes, save
from slimgrad.budget.measure import MALLOC, call_in_child, measure_peak

CHUNK = 65_536
SHORT = 256  # tokens of a chunk where bytes for each are told: so many chunks that one byte more would show
LENGTHS = [10**5, 10**6, 10**7, 10**8]


class Tiny(nn.Module):
    """Normalised linear attention over a running sum of `width` x (`width` + 1) numbers."""

    def __init__(self, vocabulary: int = 16, width: int = 2) -> None:
        super().__init__()
        self.table, self.head, self.width = nn.Embedding(vocabulary, 3 * width), nn.Linear(width, vocabulary), width

    def initial_state(self, batch_size: int) -> sg.PrefixSum:
        return sg.PrefixSum(self.head.weight.new_zeros(batch_size, self.width, self.width + 1))

    def advance(self, inputs: Tensor, state: sg.PrefixSum) -> sg.PrefixSum:
        _, k, v = self._rows(inputs)
        return state.advance(k.mT @ v)[1]

    def forward(self, inputs: Tensor, state: sg.PrefixSum) -> tuple[Tensor, sg.PrefixSum]:
        q, k, v = self._rows(inputs)
        before, following = state.advance(k.mT @ v)
        sums = before[:, None] + (k[..., None] * v[..., None, :]).cumsum(1)
        mixed = torch.einsum("btf,btfv->btv", q, sums)
        return self.head(mixed[..., :-1] / mixed[..., -1:]), following

    def _rows(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.table(inputs).chunk(3, -1)
        return q.sigmoid(), k.sigmoid(), F.pad(v, (0, 1), value=1.0)


class Computed:
    """Tokens by their positions: the middle digits of a product."""

    batch = 1

    def __init__(self, length: int) -> None:
        self.length = length

    def read(self, start: int, stop: int) -> Tensor:
        return ((torch.arange(start, stop) * 40_503) >> 7)[None] % 16


def gradient(length: int, chunk: int = CHUNK, **options: Any) -> sg.Result:
    torch.manual_seed(0)
    return sg.backward(Tiny(), Computed(length), chunk=chunk, schedule=sg.Rebuild(), **options)


def measure_time(length: int) -> dict[str, Any]:
    gradient(2 * CHUNK)  # what is loaded and filled once
    began = process_time()
    peak, seconds = measure_peak(lambda: gradient(length))
    cpu_seconds = process_time() - began  # what others on the machine do not disturb
    if peak is None:
        raise SystemExit("resident memory: expected Linux's /proc, which tells it")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "tokens_per_cpu_second": round(length / cpu_seconds),
        "resident_bytes": peak,
    }


def measure_tensors(length: int) -> dict[str, Any]:
    held: list[int] = []
    with LiveBytes() as live:
        gradient(length, on_chunk=lambda event: held.append(event.held_bytes))
    return {"live_bytes": live.peak, "held_bytes": max(held)}


def measure_per_chunk(length: int) -> dict[str, Any]:
    """Bytes that each chunk of the first sweep leaves behind, from its first tenth to its end: what is made once has
    been made by then. Arrays grow by an eighth at a time, and so may stand that much above what is in them.
    """
    chunks = -(-length // SHORT)
    gradient(8 * SHORT, SHORT)
    snapshots: dict[str, tuple[int, tracemalloc.Snapshot, int]] = {}

    def look(event: sg.Event) -> None:
        done = -(-event.stop // SHORT)
        name = {chunks // 10: "early", chunks - 1: "late"}.get(done) if event.phase == "forward" else None
        if event.phase == "reverse" and event.start == 0:
            name = "end"
        if name is not None:
            gc.collect()
            snapshots[name] = done, tracemalloc.take_snapshot(), live.live

    tracemalloc.start()
    with LiveBytes() as live:
        gradient(length, SHORT, on_chunk=look)
    tracemalloc.stop()
    early, late, end = (snapshots[name] for name in ("early", "late", "end"))
    between = late[0] - early[0]
    grown = {"plan": 0, "records": 0, "everything else": 0}
    of = {"plan.py": "plan", "record.py": "records"}
    ours = [tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, "*/benchmarks/*")]
    for found in late[1].filter_traces(ours).compare_to(early[1].filter_traces(ours), "filename"):
        grown[of.get(Path(found.traceback[0].filename).name, "everything else")] += found.size_diff
    row: dict[str, Any] = {"chunk": SHORT, "chunks": chunks}
    row |= {f"{name}_bytes_per_chunk": round(size / between, 2) for name, size in grown.items()}
    row["tensor_bytes_per_chunk"] = round((late[2] - early[2]) / between, 2)
    row["tensor_bytes_at_the_end"] = end[2]
    return {name.replace(" ", "_"): value for name, value in row.items()}


MEASURES = {"time": measure_time, "tensors": measure_tensors, "per chunk": measure_per_chunk}


def run_child(what: str, length: int, malloc: str = "default") -> dict[str, Any]:
    """Measure in a process of its own."""
    return call_in_child("benchmarks.stream:measured", {"what": what, "length": length}, environment=MALLOC[malloc])


def measured(*, what: str, length: int) -> dict[str, Any]:
    """In the child."""
    torch.set_num_threads(1)
    return MEASURES[what](length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=LENGTHS[-1], help="the longest sequence")
    parser.add_argument("--quick", action="store_true", help="no more than 10^6 tokens")
    arguments = parser.parse_args()
    longest = int(min(arguments.tokens, 10**6) if arguments.quick else arguments.tokens)
    rows: list[dict[str, Any]] = []
    for length in [length for length in LENGTHS if length < longest] + [longest]:
        row: dict[str, Any] = {"what": "length", "length": length, "chunk": CHUNK, "chunks": -(-length // CHUNK)}
        row |= run_child("tensors", length) | run_child("time", length)
        row["resident_bytes_default"] = row.pop("resident_bytes")
        row["resident_bytes_mapped"] = run_child("time", length, "mapped")["resident_bytes"]
        rows.append(row)
        default, mapped = (row[f"resident_bytes_{name}"] / 1e6 for name in ("default", "mapped"))
        print(
            f"{length:11,} tokens {row['cpu_seconds']:6.1f} s, {row['tokens_per_cpu_second']:,} a second, tensors "
            f"{row['live_bytes'] / 1e6:.2f} MB, resident {default:.1f} MB (mapped: {mapped:.1f})",
            flush=True,
        )
    row = {"what": "per chunk"} | run_child("per chunk", min(longest, 10**6))
    rows.append(row)
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    print(save("stream", rows))


if __name__ == "__main__":
    main()
