"""Fine-tuning under a hard limit on memory: the limit at which each method dies, and the one at which it finishes.

    python -m benchmarks.small_device RUN FILE      # writes results/small_device.json (Linux)

Each try is `slimgrad finetune RUN FILE` in a process of its own, whose data the kernel limits (RLIMIT_DATA). The limit
is halved in upon to 10 MB; the model that comes out under the lowest limit is compared, byte by byte, with the one that
comes out without a limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import save

STEP_MB = 10
ULIMIT = ["sh", "-c", 'ulimit -d "$0" && exec "$@"']  # then the limit in KiB, and the command
BASE = """
from slimgrad.budget.process import proc_status
from slimgrad.cli.budgeted import load_what_loads_late
load_what_loads_late()
print(proc_status("VmData"))
"""


class Trial:
    """`slimgrad finetune` with all but the limit settled."""

    def __init__(self, run: Path, file: Path, method: str, length: int, chunk: int, steps: int) -> None:
        self.command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "finetune", str(run), str(file)]
        self.command += ["--method", method, "--length", str(length), "--chunk", str(chunk), "--steps", str(steps)]

    def __call__(self, limit_mb: int | None) -> tuple[str | None, str]:
        """The checksum of the tuned model (None: the process died), and what it said last."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            limited = [] if limit_mb is None else [*ULIMIT, str(limit_mb * 1_000_000 // 1024)]
            done = subprocess.run([*limited, *self.command, "--out", str(out)], capture_output=True, text=True)
            words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            if done.returncode != 0:
                return None, f"exit status {done.returncode}: {words[0] if words else ''}"
            model = sorted((out / "snapshots").glob("step-*"))[-1] / "model.safetensors"
            return hashlib.sha256(model.read_bytes()).hexdigest(), done.stdout


def base_mb() -> int:
    """The data that Python and torch hold before any work, with what they load late."""
    done = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=True)
    return int(done.stdout) // 1_000_000


def limits(trial: Trial, low: int, high: int) -> tuple[int, int, str]:
    """The highest limit that was too little, the lowest that was enough, in MB, and the dying words at the former."""
    words = ""
    while trial(high)[0] is None:
        low, high = high, 2 * high
    while high - low > STEP_MB:
        middle = (low + high) // 2
        checksum, said = trial(middle)
        if checksum is None:
            low, words = middle, said
        else:
            high = middle
    return low, high, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 65_536])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for length in given.lengths:
        for method in ("chunked", "checkpoint", "plain"):
            trial = Trial(given.run, given.file, method, length, given.chunk, given.steps)
            base = base_mb()
            unlimited, _ = trial(None)
            dies, lives, words = limits(trial, base, base + 128)
            same = trial(lives)[0] == unlimited
            row = {"length": length, "chunk": given.chunk, "method": method, "base_mb": base, "dies_at_mb": dies,
                   "finishes_at_mb": lives, "same_model_as_without_limit": same, "dying_words": words}  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            save("small_device", rows)


if __name__ == "__main__":
    main()
