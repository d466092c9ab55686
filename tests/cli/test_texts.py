"""Texts of people: compressed, FASTA, JSON lines; what is held out of them; a file of settings."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from tests.cli.running import FOX, INPUT, SHAPE, SIZE, TINY, config, measured, refuse, rows, succeed

RECORDS = b">one\nACGTACGTacgt\n" * 40 + b">two\n" + b"ACGGT" * 100 + b"\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMGRAD_DATA", str(tmp_path / "cache"))


def test_a_compressed_text_trains_and_evaluates_as_the_text_does(fox: Path, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "fox.txt.gz"
    path.write_bytes(gzip.compress(FOX))
    out = tmp_path / "run"
    succeed("train", path, *TINY, "--out", out)
    assert measured(out) == measured(trained)
    path.write_bytes(gzip.compress(FOX, 1))  # other bytes, the same text
    succeed("train", "--resume", out)
    plain, packed = (succeed("eval", trained, text).stdout for text in (fox, path))
    assert plain.split(" bits")[0] == packed.split(" bits")[0]
    assert succeed("generate", trained, "--prompt-file", path, "--tokens", 3).stdout.startswith(FOX.decode())


def test_a_run_reads_its_format_again(trained: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "genes.fa", tmp_path / "run"
    path.write_bytes(RECORDS)
    succeed("train", path, *TINY, "--format", "fasta", "--fold-case", "--out", out)
    assert (config(out)["format"], config(out)["fold_case"]) == ("fasta", True)
    succeed("train", "--resume", out)
    found = succeed("eval", out, path).stdout
    assert f"{40 * 12 + 500:,} bytes in 41 sequences" in found
    assert f"{len(RECORDS):,} bytes as one sequence" in succeed("eval", out, path, "--format", "bytes").stdout
    assert "expected a file to read as fasta" in refuse(INPUT, "eval", out, "-", stdin=RECORDS)
    assert "expected JSON lines" in refuse(INPUT, "eval", trained, path, "--field", "text")


def test_a_field_of_json_lines(tmp_path: Path) -> None:
    path, out = tmp_path / "lines.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"id": i, "body": FOX.decode()}) + "\n" for i in range(3)))
    succeed("train", path, *TINY, "--field", "body", "--out", out)
    assert (config(out)["format"], config(out)["field"]) == ("jsonl", "body")
    assert "in 3 sequences" in succeed("eval", out, path).stdout
    assert "Name the field" in refuse(INPUT, "train", path, *TINY, "--format", "jsonl")
    assert "fold_case: expected format=fasta" in refuse(INPUT, "train", path, *TINY, "--fold-case")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_a_pipe_is_evaluated_as_it_comes(trained: Path, fox: Path, tmp_path: Path) -> None:
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(FOX,))
    writer.start()
    found = succeed("eval", trained, pipe).stdout
    writer.join()
    assert found.split(" bits")[0] == succeed("eval", trained, fox).stdout.split(" bits")[0]


def test_what_is_held_out_can_be_said(fox: Path, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(FOX[:333])
    out = tmp_path / "file"
    found = succeed("train", fox, *TINY, "--validation", other, "--out", out).stdout
    assert f"{len(FOX):,} bytes" in found
    assert f"333 for validation, from {other}" in " ".join(found.split())
    assert config(out)["validation_bytes"] == 333
    other.write_bytes(FOX[1:334])
    assert f"validation {other}: expected the bytes that" in refuse(INPUT, "train", "--resume", out)
    other.rename(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").write_bytes(FOX[:333])
    succeed("train", "--resume", out, "--validation", tmp_path / "moved.txt")
    assert "from all over it" in succeed("train", fox, *TINY, "--out", tmp_path / "spread").stdout
    assert "the last ones" in succeed("train", fox, *TINY, "--validation", "end", "--out", tmp_path / "end").stdout
    said = succeed("train", fox, *TINY, "--validation", "0.2", "--out", tmp_path / "share").stdout
    assert f"{len(FOX) // 5} for validation, the last 0.2 of each document" in " ".join(said.split())
    assert measured(tmp_path / "spread") == measured(trained)
    uneven = tmp_path / "uneven.txt"
    uneven.write_bytes(FOX[:1500] + bytes(range(256)) * 2)
    for where in ("spread", "end"):
        succeed("train", uneven, *TINY, "--validation", where, "--out", tmp_path / f"uneven {where}")
    spread, end = (rows(tmp_path / f"uneven {where}")[-1]["validation_bits"] for where in ("spread", "end"))
    assert end > spread + 0.1
    absent = refuse(INPUT, "train", fox, *TINY, "--validation", tmp_path / "absent")
    assert f"{tmp_path / 'absent'}: expected a file or folder" in absent


def test_a_run_of_before_there_was_a_choice_holds_out_the_end(fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("train", fox, *TINY, "--validation", "end", "--out", out)
    record = json.loads((out / "config.json").read_text())
    for name in ("validation", "format", "field", "fold_case", "optimizer", "parts"):
        del record["config"][name]
    (out / "config.json").write_text(json.dumps(record))
    assert "the last ones" in succeed("train", "--resume", out).stdout
    assert config(out)["validation"] == "end"


def test_a_file_of_settings_is_a_run_and_options_win(fox: Path, trained: Path, tmp_path: Path) -> None:
    settings, out = tmp_path / "run.yaml", tmp_path / "run"
    settings.write_text(
        f"corpus: {fox}\npreset: modern\nlength: 64\nchunk: 16\nfirst_length: 0\nsteps: 99\nsave_every: 2\n"
        "learning_rate: 1e-2  # without a dot YAML reads a word\nmodel:\n  layers: 1\n  width: 16\n  heads: 2\n"
    )
    succeed("train", "--config", settings, "--steps", 6, "--out", out)
    assert measured(out) == measured(trained)
    assert config(out) == config(trained)
    assert "--config" in refuse(INPUT, "train", "--resume", out, "--config", settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: many\n", "--config {}: configuration: steps"),
        ("stepps: 3\n", "--config {}: no field is called stepps. Expected any of preset, corpus, model"),
        ("model: {{depth: 3}}\n", "--config {}: model: expected any of layers,"),
        ("just words\n", "--config {}: expected lines such as 'steps: 400', found none"),
        ("a: [\n", "--config {}: expected a readable YAML file"),
        ("preset: 3\n", "--config {}: preset=3: expected a name"),
        ("chunk: 8\nmemory: 1GiB\n", "--chunk and --memory: expected one of them"),
    ],
)
def test_settings_that_make_no_sense_are_refused(content: str, message: str, fox: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content.format())
    assert message.format(path) in refuse(INPUT, "train", fox, "--config", path, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert "expected a readable YAML file" in refuse(INPUT, "train", fox, "--config", tmp_path / "absent.yaml")


def test_a_run_goes_on_after_its_end_with_its_moments(fox: Path, mine: Path, trained: Path) -> None:
    before = measured(mine)
    assert "expected a --learning-rate, since that of the run has come down (cosine) from 0.01" in refuse(
        INPUT, "train", "--resume", mine, "--steps", 4
    )
    assert measured(mine) == before
    succeed("train", "--resume", mine, "--steps", 4, "--learning-rate", 0.005, "--decay", "linear")
    after = measured(mine)
    assert after[:6] == before
    assert [row["learning_rate"] for row in after[6:]] == pytest.approx([0.005, 0.00375, 0.0025, 0.00125])
    assert config(mine)["steps"] == 10
    first = {"steps": 6, "learning_rate": 0.01, "warmup": 0.05, "decay": "cosine"}
    assert config(mine)["parts"] == [first]
    succeed("train", "--resume", mine, "--steps", 2, "--learning-rate", 0.001)
    second = {"steps": 10, "learning_rate": 0.005, "warmup": 0.0, "decay": "linear"}
    assert config(mine)["parts"] == [first, second]
    assert len(measured(mine)) == 12
    steps = ("--steps", 4, "--learning-rate", 0.005)
    snapshot = sorted((trained / "snapshots").iterdir())[0]
    assert "expected the run's folder" in refuse(INPUT, "train", "--resume", snapshot, *steps)
    assert "--steps 0: expected at least 1" in refuse(INPUT, "train", "--resume", mine, "--steps", 0)


def test_parts_are_the_same_run_in_one(fox: Path, mine: Path, tmp_path: Path) -> None:
    succeed("train", "--resume", mine, "--steps", 4, "--learning-rate", 0.005, "--decay", "linear")
    first = '[{"steps": 6, "learning_rate": 0.01, "warmup": 0.05, "decay": "cosine"}]'
    then = ("--steps", 10, "--learning-rate", 0.005, "--decay", "linear", "--set", "warmup=0", "--save-every", 2)
    succeed("train", fox, *SHAPE, *SIZE, *then, "--set", f"parts={first}", "--out", tmp_path / "whole")
    assert measured(tmp_path / "whole") == measured(mine)
    assert "parts: expected rising numbers of steps below 5, got [6]" in refuse(
        INPUT, "train", fox, *SHAPE, *SIZE, "--steps", 5, "--set", f"parts={first}"
    )


def test_a_part_that_was_killed_ends_with_the_same_bits(mine: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(mine, tmp_path / "other"))
    for folder in (mine, other):
        succeed("train", "--resume", folder, "--steps", 4, "--learning-rate", 0.005)
    for snapshot in sorted((other / "snapshots").iterdir())[-1:0:-1]:
        shutil.rmtree(snapshot)  # as if it had been killed before its last ones
    succeed("train", "--resume", other)
    assert measured(other) == measured(mine)
    last = [(sorted((one / "snapshots").iterdir())[-1] / "model.safetensors").read_bytes() for one in (mine, other)]
    assert last[0] == last[1]


@pytest.mark.parametrize("name", ["SGD:momentum=0.9,nesterov=true", "adafactor", "RMSprop", "AdamW:foreach=true"])
def test_an_optimiser_by_name_goes_on_with_the_same_bits(name: str, fox: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        said = succeed("train", fox, *TINY, "--optimizer", name, "--out", out).stdout
        assert f"{name}, learning rate 0.01" in said
    succeed("train", "--resume", sorted((parts / "snapshots").iterdir())[0])
    assert measured(parts) == measured(whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Adamm", "--optimizer Adamm: expected one of "),
        ("LBFGS", "--optimizer LBFGS: it computes the loss again and again"),
        ("SGD:speed=3", "--optimizer SGD:speed=3: "),
        ("SGD:0.9", "--optimizer SGD:0.9: expected NAME, or NAME:ARGUMENT=VALUE"),
        ("SGD:momentum=-1", "--optimizer SGD:momentum=-1: Invalid momentum value: -1"),
        ("SGD:lr=1", "expected no lr, which is --learning-rate"),
        ("Muon", "--optimizer Muon: Muon only supports 2D parameters"),
        ("SGD:weight_decay=abc", "--optimizer SGD:weight_decay=abc: "),
        ("AdamW:weight_decay=-1", "--optimizer AdamW:weight_decay=-1: Invalid weight_decay value: -1"),
        ("AdamW:betas=[0.9]", "--optimizer AdamW:betas=[0.9]: "),
        ("Rprop:weight_decay=0.1", "--optimizer Rprop:weight_decay=0.1: "),
    ],
)
def test_an_optimiser_that_does_not_fit_is_refused(name: str, message: str, fox: Path, tmp_path: Path) -> None:
    assert message in refuse(INPUT, "train", fox, *TINY, "--optimizer", name, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_budget_counts_what_the_optimiser_holds() -> None:
    from slimgrad.bytelm import build_model
    from slimgrad.bytelm.optimizer import moment_bytes
    from slimgrad.bytelm.presets import get_preset

    base = get_preset("modern")
    model = build_model(base)
    weights = sum(p.nbytes for p in model.parameters())
    held = {name: moment_bytes(base.replace(optimizer=name), model) for name in ("SGD", "SGD:momentum=0.9", "AdamW")}
    assert held["SGD"] == 0
    assert held["SGD:momentum=0.9"] == weights
    assert 2 * weights <= held["AdamW"] <= 2 * weights + 8 * len(list(model.parameters()))
