"""The published code beside ours: the same weights, the gradient of both, the time and the memory of both.

    python -m benchmarks.published FOLDER            # about ten minutes on one core; writes results/published.json
    python -m benchmarks.published FOLDER --again II # this one anew; the others are kept

FOLDER holds a copy of the paper's published code: google-research/google-research, or its folder
`performer/models/slim_performer/pytorch`, or that one's two files `slim_performer_model.py` and
`numerator_and_denominator.py`. They are imported from there, in a process of its own, so their code runs. Nothing in
the folder is changed. Two things are done around the import: the packages that it imports itself by are made to mean
the folder, and where torch has no CUDA `torch.cuda.synchronize`, which it calls after every chunk, does nothing.

First the gradients, so that nothing is timed that is not the same. The published model is made with its own
initialisation and converted; its weights are loaded back into it. Errors are ||g - g'|| / ||g'|| over all parameters,
and g' is plain backpropagation of ours in float64. On a sequence of two chunks and a token, both run in float64 too,
and no parameter may be farther off than `FLOAT64_TOLERANCE`.

Then the time: in one process under default malloc, one thread, float32, one after the other within each round; the
ratio is of two gradients of one round. "iter" is the published default and that of all its presets; "ps" materialises
the sums over the chunk. Both compute every position: the published code is given one token more, as it predicts the
next one itself.

Memory is resident bytes at the peak above those before, gradients of the parameters included, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad as sg
from benchmarks.measure import RESULTS, save
from slimgrad.budget.measure import MALLOC, call_in_child, measure_in_turn, measure_peak
from slimgrad.bytelm.presets import get_preset
from slimgrad.errors import InputError
from slimgrad.models import Performer, PerformerConfig, from_published, to_published
from slimgrad.models.published import published_arguments, published_names
from slimgrad.verification.reference import plain_backward

CASES = {"I": (256,), "II": (256, 64), "III": (256,)}  # configuration: chunks
FORMS = {"I": ("iter",), "II": ("iter", "ps"), "III": ("iter",)}  # of the published code
ROUNDS = {"I": 3, "II": 7, "III": 3}
FILES = ("slim_performer_model.py", "numerator_and_denominator.py")
INSIDE = (".", "pytorch", "slim_performer/pytorch", "performer/models/slim_performer/pytorch")
# the names by which it has imported itself
PACKAGES = ("performer.models.slim_performer.pytorch", "performer.models.pytorch.slim_performer")
FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-3


def find(folder: str) -> Path:
    """Where in the folder the published code is.

    Raises:
        InputError: there is no such folder, or it holds something else.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder. Name one that holds a copy of the published code: {_source()}")
    for inside in INSIDE:
        found = root / inside
        if all((found / file).is_file() for file in FILES):
            if "class SLiMPerformer(" not in (found / FILES[0]).read_text(encoding="utf-8"):
                raise InputError(f"{found / FILES[0]} has no class SLiMPerformer: not the published code: {_source()}")
            return found.resolve()
    raise InputError(f"{folder}: not the published code, which has the files {' and '.join(FILES)}: {_source()}")


def _source() -> str:
    return "google-research/google-research, performer/models/slim_performer/pytorch"


def load(folder: str) -> Any:
    """The published module, imported from the folder."""
    path = find(folder)
    sys.dont_write_bytecode = True  # the folder is the user's
    for package in PACKAGES:
        parts = package.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            module = sys.modules.setdefault(name, ModuleType(name))
            module.__path__ = [str(path)] if depth == len(parts) else []
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None
    return importlib.import_module(f"{PACKAGES[0]}.{Path(FILES[0]).stem}")


def digest(folder: str) -> str:
    """Which version of the published code it was: of its two files, in their order."""
    path = find(folder)
    return hashlib.sha256(b"".join((path / file).read_bytes() for file in FILES)).hexdigest()[:16]


def make_published(folder: str, config: PerformerConfig, form: str) -> Any:
    """The published model of this shape, with its own initialisation."""
    torch.manual_seed(0)
    return load(folder).SLiMPerformer(compute_type=form, **published_arguments(config))


def draw(length: int) -> Tensor:
    """Tokens, and one more: the last is a target only."""
    return torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(1))


def backward_ours(model: Performer, tokens: Tensor, chunk: int) -> None:
    model.zero_grad(set_to_none=True)
    sg.backward(model, tokens[:, :-1], tokens[:, 1:], chunk=chunk, schedule=sg.Rebuild())


def backward_plain(model: Performer, tokens: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    plain_backward(model, tokens[:, :-1], tokens[:, 1:])


def backward_published(model: Any, tokens: Tensor, chunk: int) -> None:
    model.zero_grad(set_to_none=True)
    model.loss_with_grad(tokens, chunk)


def gradient(model: nn.Module) -> dict[str, Tensor]:
    """By the published names."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return published_names(found) if isinstance(model, Performer) else {name: g.clone() for name, g in found.items()}


def distance(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """||found - truth|| / ||truth|| over all parameters."""
    if found.keys() != truth.keys():
        raise InputError(f"gradients of other parameters: {sorted(found.keys() ^ truth.keys())}")
    apart = sum((found[name].double() - g.double()).square().sum() for name, g in truth.items())
    return float((apart / sum(g.double().square().sum() for g in truth.values())) ** 0.5)


def worst(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The largest `distance` of one parameter."""
    return max(distance({name: found[name]}, {name: g}) for name, g in truth.items())


def compare(ours: Performer, theirs: Any, tokens: Tensor, chunk: int) -> dict[str, float]:
    """How far the gradients are from the truth, and from each other.

    Raises:
        InputError: so far that they are not of one function.
    """
    truth = copy.deepcopy(ours).double()
    few = tokens[:, : 2 * chunk + 2]
    backward_plain(truth, few)
    wide = copy.deepcopy(theirs).double()
    backward_published(wide, few, chunk)
    found = {"float64_apart_worst": worst(gradient(wide), gradient(truth))}
    _require(found["float64_apart_worst"], FLOAT64_TOLERANCE, "float64, the worst parameter")
    backward_plain(truth, tokens)
    backward_ours(ours, tokens, chunk)
    backward_published(theirs, tokens, chunk)
    found["error"] = distance(gradient(ours), gradient(truth))
    found["published_error"] = distance(gradient(theirs), gradient(truth))
    found["apart"] = distance(gradient(theirs), gradient(ours))
    _require(found["error"], FLOAT32_TOLERANCE, "float32, ours")
    _require(found["published_error"], FLOAT32_TOLERANCE, "float32, published")
    return found


def _require(apart: float, tolerance: float, what: str) -> None:
    if not apart <= tolerance:
        raise InputError(f"another gradient ({what}): {apart:.1e} off, at most {tolerance:.0e} expected. Nothing timed")


def measure(folder: str, name: str, rounds: int) -> list[dict[str, Any]]:
    """In the child process: the same weights in both, their gradients compared, then their times."""
    torch.set_num_threads(1)
    config, length = get_preset(name).model, get_preset(name).length
    tokens = draw(int(length))
    published = {form: make_published(folder, config, form) for form in FORMS[name]}
    arguments = published_arguments(config)
    ours = from_published(
        next(iter(published.values())).state_dict(),
        heads=arguments["n_heads"],
        feature_type=arguments["feature_type"],
        on_gptln=arguments["on_gptln"],
    )
    for theirs in published.values():
        theirs.load_state_dict(to_published(ours))
    rows = [
        {"model": name, "length": length, "chunk": chunk, "form": form, **compare(ours, theirs, tokens, chunk)}
        for chunk in CASES[name]
        for form, theirs in published.items()
    ]
    works: dict[str, Any] = {}
    for chunk in CASES[name]:
        works[f"ours {chunk}"] = partial(backward_ours, ours, tokens, chunk)
        for form, theirs in published.items():
            works[f"{form} {chunk}"] = partial(backward_published, theirs, tokens, chunk)
    seconds = measure_in_turn(works, rounds)
    for row in rows:
        own, other = seconds[f"ours {row['chunk']}"], seconds[f"{row['form']} {row['chunk']}"]
        times_as_fast = [b / a for a, b in zip(own, other, strict=True)]
        row |= {
            "seconds": median(own),
            "published_seconds": median(other),
            "times_as_fast": median(times_as_fast),
            "times_as_fast_min": min(times_as_fast),
            "times_as_fast_max": max(times_as_fast),
            "rounds": rounds,
        }
    return rows


def measure_memory(folder: str, name: str, chunk: int, form: str | None) -> int:
    """In the child process: peak resident bytes of one gradient above those before; form None: ours."""
    torch.set_num_threads(1)
    config = get_preset(name).model
    small = PerformerConfig(layers=1, width=64, heads=1)
    works: list[Any] = []
    for shape, length, part in ((small, 64, 8), (config, int(get_preset(name).length), chunk)):
        if form is None:
            torch.manual_seed(0)
            works.append(partial(backward_ours, Performer(shape), draw(length), part))
        else:
            works.append(partial(backward_published, make_published(folder, shape, form), draw(length), part))
    warm_up, work = works
    warm_up()  # loads what torch loads lazily
    peak = measure_peak(work).peak_bytes
    if peak is None:
        raise InputError("resident memory: expected Linux's /proc, which tells it")
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--again", action="append", default=[], choices=CASES, help="measure this one anew")
    arguments = parser.parse_args()
    try:
        version = digest(arguments.folder)
    except InputError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    folder, path = str(find(arguments.folder)), RESULTS / "published.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["published_sha256"] == version and row["model"] not in arguments.again]
    for name in CASES:
        if any(row["model"] == name for row in rows):
            continue
        task: dict[str, Any] = {"folder": folder, "name": name, "rounds": ROUNDS[name]}
        measured = call_in_child("benchmarks.published:measure", task, environment=MALLOC["default"])
        task = {"folder": folder, "name": name}
        peaks = {
            (chunk, form): call_in_child(
                "benchmarks.published:measure_memory",
                {**task, "chunk": chunk, "form": form},
                environment=MALLOC["default"],
            )
            for chunk in CASES[name]
            for form in (None, *FORMS[name])
        }
        for row in measured:
            own, other = (peaks[row["chunk"], form] for form in (None, row["form"]))
            rows.append({**row, "peak_bytes": own, "published_peak_bytes": other, "published_sha256": version})
            print(rows[-1], flush=True)
        rows.sort(key=lambda row: list(CASES).index(row["model"]))
        save("published", rows, ["FOLDER"])


if __name__ == "__main__":
    main()
