"""Memory against length at a fixed chunk: ours, plain backpropagation, per-layer checkpointing.

    python -m benchmarks.memory            # about half an hour on two cores; writes results/memory.json

Three figures per point: live tensor bytes (counted), and resident memory above what the process held before (median of
three processes) under glibc's default malloc and with every block of 64 KiB or more mapped on its own.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from benchmarks.measure import SCHEDULES, SMALL, Case, count_live_bytes, run_child, save

CHUNK = 2048
LENGTHS = [4096 << shift for shift in range(0, 9, 2)]  # 4,096 to 1,048,576
LONGEST = {"plain": 1 << 16, "checkpoint": 1 << 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--longest", type=int, default=1 << 20)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for method in ("plain", "checkpoint", "rebuild", "binomial"):
        for length in LENGTHS:
            if length > min(LONGEST.get(method, 1 << 30), arguments.longest):
                continue
            case = Case(model=SMALL, length=length, method=method, chunk=CHUNK if method in SCHEDULES else 0)
            row: dict[str, Any] = {"method": method, "length": length, "chunk": case.chunk}
            row["live_bytes"] = count_live_bytes(case)
            settings = [malloc for malloc in ("default", "mapped") for _ in range(arguments.processes)]
            with ThreadPoolExecutor(arguments.workers) as pool:  # memory does not mind company, as time would
                measured = list(pool.map(lambda malloc, case=case: run_child(case, malloc)["resident_bytes"], settings))
            for malloc in ("default", "mapped"):
                found = [value for value, setting in zip(measured, settings, strict=True) if setting == malloc]
                row[f"resident_bytes_{malloc}"] = median(found)
            rows.append(row)
            print(row, flush=True)
            save("memory", rows)


if __name__ == "__main__":
    main()
