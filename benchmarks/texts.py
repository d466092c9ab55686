"""Bits per byte of held-out text: ours beside compressors, a 6-gram model and an LSTM, in equal CPU time.

    python -m benchmarks.texts --data FOLDER     # half an hour on two cores, resumable; writes results/texts.json

FOLDER holds dickens.xz (Silesia corpus), an archive books*.tar.xz with Moby-Dick among its books, and
lambda_virus.fa. What is held out of each is what `slimgrad train` holds out; everyone predicts these bytes in one
stream. Ours is trained as `slimgrad train` does it with nothing said, and the CPU seconds that this takes, validation
excluded, are what each LSTM has. Compressors and the 6-gram model (`benchmarks.texts_peers`) read the training bytes
first. Each row is made in a process of its own, in one thread.
"""

from __future__ import annotations

import argparse
import json
import lzma
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import RESULTS, save
from benchmarks.texts_peers import COMPRESSORS, ORDER, kneser_ney_bits, train_lstm
from slimgrad.budget.measure import call_in_child
from slimgrad.bytelm import TrainConfig, evaluate_stream, get_preset, make_task, split_corpus, train, validate
from slimgrad.cli.texts import validation_bytes
from slimgrad.data import Corpus, Documents, Reading, load_corpus

BOOK = "Herman Melville/Moby-Dick.md"
CORPORA = ("dickens", "Moby-Dick", "lambda_virus")
RATES = (8e-3, 4e-3)
Task = tuple[str, dict[str, Any]]
OURS, LSTM, NGRAM = "slimgrad", "LSTM", f"{ORDER}-gram"


class Parts(NamedTuple):
    """The bytes to learn from and those to predict, `[bytes]` in uint8."""

    train: np.ndarray
    held_out: np.ndarray


def read_corpus(name: str, data: Path) -> Corpus:
    """One of `CORPORA`, in memory."""
    if name == "lambda_virus":
        return load_corpus(data / "lambda_virus.fa", reading=Reading(format="fasta"))
    if name == "dickens":
        content = lzma.decompress((data / "dickens.xz").read_bytes())
    else:
        archive = next(path for path in sorted(data.glob("books*.tar.xz")))
        with tarfile.open(archive) as books:
            member = next(one for one in books if one.name.endswith(BOOK))
            found = books.extractfile(member)
            assert found is not None
            content = found.read()
    return Corpus(name=name, source=name, text=Documents([torch.frombuffer(bytearray(content), dtype=torch.uint8)]))


def default_config(corpus: Corpus) -> TrainConfig:
    """What `slimgrad train` does with it where nothing is said; but validated at the end alone."""
    preset = get_preset("modern")
    return preset.replace(validation_bytes=validation_bytes(corpus, preset.validation), eval_every=preset.steps)


def read_parts(corpus: Corpus) -> Parts:
    """What `slimgrad train` learns from, and what it holds out, each as one stream."""
    split = split_corpus(default_config(corpus), corpus)
    return Parts(*(text.read(0, len(text)).contiguous().numpy() for text in split))


def measure_ours(corpus: str, data: str, model: str, seed: int) -> dict[str, Any]:
    """In the child: the default run."""
    torch.set_num_threads(1)
    text = read_corpus(corpus, Path(data))
    config = default_config(text).replace(seed=seed)
    began = time.process_time()
    trained = train(config, text)
    ended = time.process_time()
    validate(config, trained.model, make_task(config, text))  # once more, for its seconds
    seconds = ended - began - (time.process_time() - ended)
    held_out = torch.from_numpy(read_parts(text).held_out)
    found = evaluate_stream(trained.model, [held_out], chunk=1024)
    return {
        "bits_per_byte": (found.bits + 8) / len(held_out),  # the first byte, of which nothing is known
        "cpu_seconds": seconds,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "steps": config.steps,
        "bytes_seen": trained.rows[-1].bytes_seen,
    }


def measure_lstm(
    corpus: str, data: str, model: str, learning_rate: float, cpu_seconds: float, parameters: int
) -> dict[str, Any]:
    """In the child: an LSTM of about so many parameters, for so many CPU seconds."""
    torch.set_num_threads(1)
    parts = read_parts(read_corpus(corpus, Path(data)))
    return train_lstm(*parts, parameters=parameters, cpu_seconds=cpu_seconds, learning_rate=learning_rate)


def measure_untrained(corpus: str, data: str, model: str) -> dict[str, Any]:
    """In the child: a compressor or the 6-gram model."""
    parts = read_parts(read_corpus(corpus, Path(data)))
    began = time.process_time()
    if model == NGRAM:
        bits = float(kneser_ney_bits(*parts))
    else:
        sizes = [len(COMPRESSORS[model](part.tobytes())) for part in (np.concatenate(parts), parts.train)]
        bits = 8.0 * (sizes[0] - sizes[1])
    seconds = time.process_time() - began
    return {
        "bits_per_byte": bits / len(parts.held_out),
        "cpu_seconds": seconds,
        "train_bytes": len(parts.train),
        "held_out_bytes": len(parts.held_out),
    }


def tasks() -> list[list[Task]]:
    """What makes each row, and what the row is: first those that need no other, then those that need ours."""
    first: list[Task] = [("measure_ours", {"corpus": corpus, "model": OURS, "seed": 0}) for corpus in CORPORA]
    for corpus in CORPORA:
        first += [("measure_untrained", {"corpus": corpus, "model": model}) for model in (*COMPRESSORS, NGRAM)]
    lstms = ({"corpus": corpus, "model": LSTM, "learning_rate": rate} for rate in RATES for corpus in CORPORA)
    return [first, [("measure_lstm", what) for what in lstms]]


def as_ours(rows: list[dict[str, Any]], corpus: str) -> dict[str, Any]:
    """What an LSTM is given: the parameters and the CPU seconds of our run on the same corpus."""
    ours = next(row for row in rows if (row["corpus"], row["model"]) == (corpus, OURS))
    return {name: ours[name] for name in ("cpu_seconds", "parameters")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=1, help="rows at once")
    parser.add_argument("--again", metavar="WORD,...", help="measure anew what has all of these: a model, a corpus")
    given = parser.parse_args()
    torch.set_num_threads(1)  # as in the children; the results name it
    path = RESULTS / "texts.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    if given.again:
        rows = [row for row in rows if not {*given.again.split(",")} <= {row["model"], row["corpus"]}]

    def measured(task: Task) -> dict[str, Any]:
        function, what = task
        arguments = what | {"data": str(given.data)}
        if what["model"] == LSTM:
            arguments |= as_ours(rows, what["corpus"])
        return what | call_in_child(f"benchmarks.texts:{function}", arguments, environment={"OMP_NUM_THREADS": "1"})

    for some in tasks():
        left = [task for task in some if not any(task[1].items() <= row.items() for row in rows)]
        with ThreadPoolExecutor(given.workers) as pool:
            for made in as_completed([pool.submit(measured, task) for task in left]):
                rows.append(made.result())
                print(json.dumps(rows[-1]), flush=True)
                save("texts", rows, ["--data", "FOLDER", "--workers", str(given.workers)])


if __name__ == "__main__":
    main()
