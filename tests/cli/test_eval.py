"""`slimgrad eval`: bits per byte of a text as it streams by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import slimgrad
from slimgrad.bytelm import open_model
from slimgrad.cli.app import app
from tests.cli.running import FOX, TINY, refuse, snapshots, succeed


def bits_of(run: Path, *texts: bytes) -> float:
    """By the library, each text whole."""
    model, _ = open_model(run)
    bits = predicted = 0.0
    for text in texts:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)[None]
        result = slimgrad.evaluate(model, tokens, chunk=len(text))
        bits += float(result.loss) * result.num_targets / math.log(2)
        predicted += result.num_targets
    return bits / predicted


@pytest.mark.parametrize("chunk", [3, 100, 4096])
def test_a_file_costs_what_the_library_says_of_the_whole(chunk: int, trained: Path, fox: Path) -> None:
    result = succeed("eval", trained, fox, "--chunk", chunk)
    first, second, _ = result.stdout.splitlines()
    assert first == f"{bits_of(trained, FOX):.4f} bits per byte: {fox}, {len(FOX):,} bytes as one sequence"
    assert second.startswith(f"{len(FOX) - 1:,} bytes predicted in ")


def test_standard_input_costs_what_a_file_costs(trained: Path, fox: Path) -> None:
    piped = succeed("eval", trained, "-", stdin=FOX).stdout.splitlines()[0]
    assert piped == succeed("eval", trained, fox).stdout.splitlines()[0].replace(str(fox), "-")


def test_a_folder_costs_what_its_documents_cost(trained: Path, documents: Path) -> None:
    texts = [path.read_bytes() for path in sorted(documents.iterdir())]
    (documents / "one byte").write_bytes(b"1")
    first = succeed("eval", trained, documents).stdout.splitlines()[0]
    assert first == (
        f"{bits_of(trained, *texts):.4f} bits per byte: {documents}, {sum(map(len, texts)):,} bytes in {len(texts)} "
        "sequences, each from nothing"
    )


def test_a_run_its_snapshot_and_its_model_s_file_agree(trained: Path, fox: Path) -> None:
    last = snapshots(trained)[-1]
    firsts = {succeed("eval", path, fox).stdout.splitlines()[0] for path in (trained, last, last / "model.safetensors")}
    assert len(firsts) == 1
    assert succeed("eval", snapshots(trained)[0], fox).stdout.splitlines()[0] not in firsts


def test_the_step_that_was_read_is_said_and_whether_the_run_diverged_after_it(
    trained: Path, fox: Path, tmp_path: Path
) -> None:
    assert f"\n{trained}: step 6 of 6\n" in succeed("eval", trained, fox).stdout
    first = snapshots(trained)[0]
    assert f"\n{first}: step 4 of 6\n" in succeed("eval", first, fox).stdout
    assert len(succeed("eval", first / "model.safetensors", fox).stdout.splitlines()) == 2  # which does not tell
    out = tmp_path / "run"
    refuse(1, "train", fox, *TINY, "--learning-rate", 1e30, "--save-every", 1, "--out", out)
    step = int(snapshots(out)[-1].name.removeprefix("step-"))
    assert f"\n{out}: step {step} of 6, after which the run diverged\n" in succeed("eval", out, fox).stdout


def test_progress_goes_to_standard_error_alone(trained: Path, fox: Path) -> None:
    arguments = ["eval", str(trained), str(fox), "--chunk", "8"]
    shown = CliRunner().invoke(app, arguments, env={"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm"})
    assert shown.exit_code == 0
    assert "bits/byte" in shown.stderr
    assert "bits/byte" not in shown.stdout
    assert "\x1b" not in shown.stdout
    assert len(shown.stdout.splitlines()) == 3
