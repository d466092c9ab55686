"""One exact gradient over a whole text as a single sequence: is it right, does it survive, what does it take?

    python -m benchmarks.whole_text check TEXT     # the gradient of `slimgrad train`, against Algorithm 1 in float64
    python -m benchmarks.whole_text kills TEXT     # killed at three random moments and resumed: the same bits?
    python -m benchmarks.whole_text run TEXT       # the whole text; writes results/whole_text.json as it ends

TEXT is a file or a folder; `--bytes` takes its beginning alone (of `check` and `kills`: 2,000,000). The command is

    slimgrad train TEXT --preset II --length all --steps 1 --memory 1GiB --validation end --set model.layers=2 ...

Its gradient is read off the optimiser's first moment, which after one step is a tenth of it (clipped). Beside the
error is that of the same chunks in plain float32: Algorithm 1 again, in float32; and that of plain backpropagation in
float32 where its graph takes a few gigabytes (`--bytes 200000`), not tens of them. What the run measured by the way
(seconds, memory, adjoint) is in its traces/.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, save
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.folder import read_record, read_rows
from slimgrad.bytelm.loop import build_model
from slimgrad.bytelm.task import make_task
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.data import load_corpus
from slimgrad.runs.tensors import read_tensors
from slimgrad.states.base import State
from slimgrad.sweep import algorithm1, tree
from slimgrad.sweep.random import derive_seed, seeded

PRESET, SHAPE = "II", {"layers": 2, "width": 128, "heads": 4}
SLIMGRAD = str(Path(sys.executable).parent / "slimgrad")
BYTES, PLAIN_BYTES, MEMORY = 2_000_000, 250_000, "1GiB"


def command(text: Path, out: Path, memory: str, chunk: int | None = None) -> list[str]:
    """The run, from its beginning; with the chunk of another run's plan, which is timed anew each time."""
    shape = [f"--set=model.{name}={value}" for name, value in SHAPE.items()]
    dial = ["--memory", memory] if chunk is None else ["--chunk", str(chunk), "--no-compare"]
    how = ["--preset", PRESET, "--length", "all", "--steps", "1", "--validation", "end", *dial]
    return [SLIMGRAD, "train", str(text), "--out", str(out), *how, *shape]


def beginning(text: Path, num_bytes: int | None, folder: Path) -> Path:
    """The text itself, or a file of its first bytes."""
    if num_bytes is None:
        return text
    documents = load_corpus(text).text
    path = folder / f"first-{num_bytes}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(documents.read(0, min(num_bytes, len(documents))).numpy().tobytes())
    return path


def snapshot(run: Path) -> Path:
    """The last one of a run."""
    return max((run / "snapshots").glob("step-*"))


def first_moment(run: Path) -> dict[str, Tensor]:
    """The optimiser's first moments after one step, by parameter."""
    tensors = read_tensors(snapshot(run) / "optimizer.safetensors")
    return {name.removesuffix(":exp_avg"): x for name, x in tensors.items() if name.endswith(":exp_avg")}


def the_batch(config: TrainConfig, text: Path) -> tuple[Any, int, Any, Any]:
    """The inputs of the run's one step, their length, the model, and the state that it begins with."""
    (batch,) = make_task(config, load_corpus(text)).batches(first=0)
    inputs, model = batch.sequences[0], build_model(config)
    with seeded(derive_seed(derive_seed(config.seed, 0), 0)):
        state = model.initial_state(1)
    return inputs, inputs.length if hasattr(inputs, "read") else inputs.shape[1], model, state


def plain(config: TrainConfig, text: Path) -> dict[str, Tensor]:
    """The gradient by plain backpropagation over the whole, in float32."""
    inputs, time_, model, state = the_batch(config, text)
    tokens = inputs.read(0, time_) if hasattr(inputs, "read") else inputs
    outputs, _ = model(tokens, state)
    targets = torch.nn.functional.pad(tokens[:, 1:].long(), (0, 1), value=-100)
    (cross_entropy_sum(outputs, targets) / (time_ - 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def specified(config: TrainConfig, text: Path, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the run's one step by Algorithm 1, in plain Python lists, from the same weights."""
    inputs, time_, model, state = the_batch(config, text)
    model = copy.deepcopy(model).to(dtype)

    def as_dtype(leaf: Any) -> Any:
        if isinstance(leaf, State):
            return leaf.with_value(as_dtype(leaf.value))
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    read = inputs.read if hasattr(inputs, "read") else lambda start, stop: inputs[:, start:stop]
    spans = [(start, min(start + config.chunk, time_)) for start in range(0, time_, config.chunk)]

    def step(span: Tensor, state: Any) -> tuple[Tensor, Any]:
        start, stop = (int(x) for x in span)
        tokens = read(start, min(stop + 1, time_))
        outputs, following = model(tokens[:, : stop - start], state)
        targets = tokens[:, 1:].long()
        if stop == time_:
            targets = torch.nn.functional.pad(targets, (0, 1), value=-100)
        return cross_entropy_sum(outputs, targets) / (time_ - 1), following

    names, parameters = zip(*model.named_parameters(), strict=True)
    chunks = [torch.tensor(span) for span in spans]
    loss, found, _, _ = algorithm1.gradients(step, chunks, tree.map_leaves(as_dtype, state), parameters)
    return float(loss.detach()), dict(zip(names, found, strict=True))


def distance(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of all gradients together, relative."""
    off = math.sqrt(sum(float((found[name].double() - x.double()).square().sum()) for name, x in truth.items()))
    return off / math.sqrt(sum(float(x.double().square().sum()) for x in truth.values()))


def check(text: Path, folder: Path, memory: str) -> dict[str, Any]:
    """The command's gradient against Algorithm 1."""
    run = folder / "check"
    began = time.perf_counter()
    subprocess.run(command(text, run, memory), check=True)
    seconds = time.perf_counter() - began
    record, (row,) = read_record(run), read_rows(run)
    config = TrainConfig.from_dict(record["config"])
    loss, truth = specified(config, text, torch.float64)
    single_loss, single = specified(config, text, torch.float32)
    share = 1 - config.betas[0]
    clipped = min(1.0, (config.clip_norm or math.inf) / (row.gradient_norm + 1e-6))  # as torch clips
    ours = {name: x / share / clipped for name, x in first_moment(run).items()}
    beside = {}
    if row.num_bytes <= PLAIN_BYTES:
        beside["error_plain"] = distance(plain(config, text), truth)
    return beside | {
        "what": "check", "bytes": row.num_bytes, "threads": record["sessions"][-1]["threads"],
        "command_seconds": seconds, "step_seconds": row.seconds,
        "loss": row.bits * math.log(2), "loss_float64": loss, "loss_float32": single_loss,
        "error": distance(ours, truth), "error_float32": distance(single, truth),
    }  # fmt: skip


def kills(text: Path, folder: Path, memory: str) -> dict[str, Any]:
    """The command killed at three random moments, resumed each time, against itself undisturbed.

    Once at any moment of its beginning, then some seconds after a save: what was done since is lost each time.
    """
    generator = random.Random()
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    began = time.perf_counter()
    subprocess.run(command(text, undisturbed, memory), check=True)
    whole = time.perf_counter() - began
    moments: list[dict[str, Any]] = []
    arguments = command(text, killed, memory, read_record(undisturbed)["plan"]["chunk"])
    record = killed / "gradient" / "step-00000001" / "segment.json"
    for after_a_save in (False, True, True):
        process, started = subprocess.Popen(arguments), time.time()
        while after_a_save and process.poll() is None and not (record.exists() and record.stat().st_mtime > started):
            time.sleep(0.05)
        try:
            process.wait(generator.uniform(3.0, 9.0) if after_a_save else generator.uniform(0.05, 0.25) * whole)
            break  # it ended before it could be killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        moments.append({"after_seconds": time.time() - started, "saved": record.exists()})
        arguments = [SLIMGRAD, "train", "--resume", str(killed)]
    if moments:
        subprocess.run(arguments, check=True)
    same = all(
        (snapshot(undisturbed) / name).read_bytes() == (snapshot(killed) / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    )
    losses = [read_rows(run)[0].bits for run in (undisturbed, killed)]
    return {
        "what": "kills", "bytes": read_rows(killed)[0].num_bytes,
        "threads": read_record(killed)["sessions"][-1]["threads"], "seconds": whole, "kills": moments,
        "same_bits": same and losses[0] == losses[1],
    }  # fmt: skip


def whole_run(text: Path, folder: Path, memory: str) -> dict[str, Any]:
    """The whole text; goes on where it was, if it was begun."""
    run = folder / "run"
    resume = [SLIMGRAD, "train", "--resume", str(run)]
    if not (run / "metrics.jsonl").exists() or not read_rows(run):  # else it is done
        subprocess.run(resume if (run / "config.json").exists() else command(text, run, memory), check=True)
    record, (row,) = read_record(run), read_rows(run)
    trace = [json.loads(line) for path in (run / "traces").glob("*.jsonl") for line in path.read_text().splitlines()]
    return {
        "what": "run", "bytes": row.num_bytes, "threads": record["sessions"][-1]["threads"],
        "step_seconds": row.seconds, "bytes_per_second": row.bytes_per_second,
        "sessions": len(record["sessions"]), "memory": memory,
        "plan": record["plan"], "bits": row.bits, "gradient_norm": row.gradient_norm, "trace": trace,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "kills", "run"))
    parser.add_argument("text", type=Path)
    parser.add_argument("--bytes", type=int)
    parser.add_argument("--memory", default=MEMORY)
    parser.add_argument("--folder", type=Path, default=Path("runs/whole-text"))
    options = parser.parse_args()
    num_bytes = options.bytes or (None if options.what == "run" else BYTES)
    text = beginning(options.text, num_bytes, options.folder)
    work = {"check": check, "kills": kills, "run": whole_run}[options.what]
    row = work(text, options.folder, options.memory)
    print({name: value for name, value in row.items() if name != "trace"})
    path = RESULTS / "whole_text.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [one for one in rows if (one["what"], one["bytes"]) != (row["what"], row["bytes"])]
    save("whole_text", [*rows, row], ["check|kills|run", "TEXT"])


if __name__ == "__main__":
    main()
