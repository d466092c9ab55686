"""`slimgrad eval`, `generate` and `finetune`: what is done with a trained model."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimgrad as sg
from slimgrad.cli.generating import decoded
from slimgrad.cli.words import parse_bytes, printable
from slimgrad.train import generate, open_model
from slimgrad.train.folder import read_rows
from tests.cli.command import refused, run
from tests.train.settings import TEXT

MISSING = "expected the folder of a run, found no such folder"


def bits_of(model: torch.nn.Module, text: torch.Tensor) -> float:
    return float(sg.evaluate(model, text[None]).loss) / math.log(2)


def test_eval_is_bits_per_byte_over_the_file_as_one_sequence(finished: Path, text: Path) -> None:
    model, _ = open_model(finished)
    result = run("eval", finished, text, "--chunk", 50)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first == f"{bits_of(model, TEXT):.4f} bits per byte: {text}, 1,800 bytes as one sequence"
    assert second.startswith("1,799 bytes predicted in ")
    assert " MB resident" in second


def test_eval_reads_standard_input(finished: Path) -> None:
    model, _ = open_model(finished)
    result = run("eval", finished, "-", stdin=bytes(TEXT[:700].tolist()))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{bits_of(model, TEXT[:700]):.4f} bits per byte: -, 700 bytes as one sequence")


def test_eval_of_a_folder_starts_anew_with_each_document(finished: Path, tmp_path: Path) -> None:
    model, _ = open_model(finished)
    lengths = (300, 120)
    for length in lengths:
        (tmp_path / str(length)).write_bytes(bytes(TEXT[:length].tolist()))
    expected = sum(bits_of(model, TEXT[:length]) * (length - 1) for length in lengths) / (sum(lengths) - 2)
    result = run("eval", finished, tmp_path)
    assert result.exit_code == 0, result.output
    assert f"{expected:.4f} bits per byte" in result.stdout
    assert "420 bytes in 2 sequences, each from nothing" in result.stdout


def test_eval_into_a_pipe_says_two_lines_and_nothing_else(finished: Path, text: Path) -> None:
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "eval", str(finished), str(text)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_what_eval_cannot_read_is_refused(finished: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "one").write_bytes(b"a")
    refused(run("eval", tmp_path / "absent", text), MISSING)
    refused(run("eval", finished, tmp_path / "absent"), "expected a file, found nothing of that name")
    refused(run("eval", finished, text, "--chunk", 0), "--chunk 0: expected at least 1")
    for name in ("empty", "one"):
        result = run("eval", finished, tmp_path / name)
        assert result.exit_code == 2
        assert "expected at least two bytes" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused(finished: Path, text: Path, tmp_path: Path) -> None:
    for command in (["eval", finished, text], ["generate", finished], ["train", text, "--out", tmp_path / "run"]):
        refused(run(*command, "--device", "cuda"), "device 'cuda': expected a GPU that torch can use, found none")
    assert not (tmp_path / "run").exists()


def test_generate_writes_the_bytes_as_they_are(finished: Path, tmp_path: Path) -> None:
    model, _ = open_model(finished)
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 3}
    expected = b"the quick" + generate(model, b"the quick", 40, **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("generate", finished, "--prompt", "the quick", "--tokens", 40, *words).stdout_bytes == expected
    (tmp_path / "prompt").write_bytes(b"the quick")
    assert (
        run("generate", finished, "--prompt-file", tmp_path / "prompt", "--tokens", 40, *words).stdout_bytes == expected
    )


def test_what_generate_cannot_do_is_refused(finished: Path, tmp_path: Path) -> None:
    cases: dict[tuple[object, ...], str] = {
        ("--temperature", -1): "temperature=-1.0: expected zero or more",
        ("--top-p", 0): "top_p=0.0: expected more than 0",
        ("--tokens", -1): "num_bytes=-1: expected zero or more",
        ("--seed", -1): "seed=-1: expected between 0",
        ("--prompt", ""): "prompt: expected at least one byte",
        ("--prompt-file", tmp_path / "absent"): "expected a readable file, got: No such file",
    }
    for arguments, message in cases.items():
        refused(run("generate", finished, *arguments), message)
    refused(run("generate", tmp_path / "absent"), MISSING)


def test_characters_appear_when_they_are_whole() -> None:
    content = "grün\r\n\x07".encode() + b"\xff"
    assert list(decoded(iter(content[2:]), content[:2])) == ["gr", "", "ü", "n", "\r", "\n", "\x07", "\ufffd", ""]
    assert printable("".join(decoded(iter(content), b""))) == "grün\n\ufffd\ufffd"


def test_finetuning_makes_a_run_of_its_own_that_knows_the_text_better(finished: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.txt"
    new.write_bytes(b"pack my box with five dozen liquor jugs. " * 60)
    kept = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = run("finetune", finished, new, "--learning-rate", 1e-2, "--steps", 12, "--out", tmp_path / "tuned")
    assert result.exit_code == 0, result.output
    assert "before the first step  validation" in result.stdout
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == kept
    before = bits_of(open_model(finished)[0], torch.tensor(list(new.read_bytes()), dtype=torch.uint8))
    after = bits_of(open_model(tmp_path / "tuned")[0], torch.tensor(list(new.read_bytes()), dtype=torch.uint8))
    assert after < before - 0.5
    assert len(read_rows(tmp_path / "tuned")) == 12


def test_what_finetuning_cannot_do_is_refused(finished: Path, text: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "tuned"]
    refused(run("finetune", tmp_path / "absent", text, *out), MISSING)
    refused(run("finetune", finished, tmp_path / "absent", *out), "found nothing of that name")
    refused(run("finetune", finished, text, "--chunk", 0, *out), "chunk=0: expected at least 1")
    refused(run("finetune", finished, text, "--memory", "much", *out), "'much': expected an amount of memory such as")
    refused(run("finetune", finished, text, "--out", finished), "found a run. Go on with it")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data on Linux alone")
def test_a_memory_limit_that_is_too_low_is_one_message(finished: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from slimgrad.cli import main; main()", "finetune", str(finished), str(text)]
    done = subprocess.run(
        [*command, "--memory", "50MB", "--out", str(tmp_path / "tuned")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("slimgrad: a memory limit of 50 MB: expected more than the ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("800MB", 800_000_000), ("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30), ("12", 12), ("3kb", 3000)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
