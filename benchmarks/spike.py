"""One training curve of the copying task has a spike: is it the chunks' doing, or the learning rate's?

Copying at C = 128, seed 0, jumps by ten bits near step 7,600, while the published learning rate is still 1e-2; plain
backpropagation with the same seed does not. Two things tell whose doing it is: how far the chunked gradient is from the
plain one at the same weights, step by step through the spike; and whether plain backpropagation, from the same state
at step 7,500, has the spike too.

    python -m benchmarks.spike [--run FOLDER]      # 15 minutes; a run that is there already is taken up

The run is the programme's own point, so its curve must be that of benchmarks/results/reproduce in every bit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.figures import at_largest
from benchmarks.measure import RESULTS, save
from slimgrad.bytelm import Row, RunFolder, TrainConfig, loop, train
from slimgrad.bytelm.gradient import add_gradient
from slimgrad.paper.compatibility import compatibility_points
from slimgrad.paper.regimes import HALF, train_regime

CHUNKED, PLAIN = "copying chunked-128-seed0", "copying plain-seed0"
STEPS = 300  # from half-way on


class _EnoughError(Exception):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="where the chunked run is, or is to be")
    folder = parser.parse_args().run or Path(tempfile.mkdtemp()) / "chunked"
    torch.set_num_threads(1)
    tasks = {point.name: point.task for point in compatibility_points("copying")}
    configs = {name: TrainConfig.from_dict(tasks[name]["config"]) for name in (CHUNKED, PLAIN)}
    curve = train_regime(folder=str(folder), config=tasks[CHUNKED]["config"], keep_half=True)["bits"]
    half = Path(f"{folder}{HALF}")
    chunked, plain = go_on(half, configs[CHUNKED]), go_on(half, configs[PLAIN])
    same = curve == committed_curve()
    rows = [{"gradient": "chunked", "same_curve_as_the_programme": same, **chunked}, {"gradient": "plain", **plain}]
    for name, found in (("chunked", chunked), ("plain", plain)):
        print(f"{name}: largest loss {max(found['bits']):.2f} bits, at step {at_largest(found):,}")
    print(f"chunked off plain at the same weights: at most {max(chunked['off_plain']):.1e}")
    print(save("spike", rows))


def go_on(half: Path, config: TrainConfig) -> dict[str, Any]:
    """Some steps from the state in `half`: loss, gradient's length, and how far a chunked one is from the plain one."""
    found: dict[str, list[float]] = {"steps": [], "bits": [], "gradient_norm": [], "off_plain": []}

    def compared(model: Any, batch: Any, *, method: Any, **how: Any) -> float:
        loss = add_gradient(model, batch, method=method, **how)
        if method == "chunked":
            chunked = [parameter.grad for parameter in model.parameters()]
            model.zero_grad(set_to_none=True)
            add_gradient(model, batch, method="plain", **how)
            plain = [parameter.grad for parameter in model.parameters()]
            off = sum(float((a - b).double().square().sum()) for a, b in zip(chunked, plain, strict=True))
            found["off_plain"].append(math.sqrt(off / sum(float(b.double().square().sum()) for b in plain)))
            for parameter, gradient in zip(model.parameters(), chunked, strict=True):
                parameter.grad = gradient
        return loss

    def note(row: Row) -> None:
        found["steps"].append(row.step)
        found["bits"].append(row.bits)
        found["gradient_norm"].append(row.gradient_norm)
        if len(found["steps"]) == STEPS:
            raise _EnoughError

    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(loop, "add_gradient", compared):
        copy = shutil.copytree(half, Path(scratch) / "run", ignore=shutil.ignore_patterns(".lock"))
        with RunFolder.reopen(copy) as run:
            run.record = run.record | {"config": config.to_dict()}
            with suppress(_EnoughError):
                train(config, None, note, run=run)
    return found


def committed_curve() -> list[float]:
    """The curve of the same point among the committed results."""
    rows = json.loads((RESULTS / "reproduce" / "rows.json").read_text())["rows"]
    return next(row["result"]["bits"] for row in rows if row["name"] == CHUNKED)


if __name__ == "__main__":
    main()
