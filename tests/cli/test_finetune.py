"""`slimgrad finetune`: a run of its own, within a limit on memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import config, everything, refuse, rows, snapshots, succeed

SPHINX = b"sphinx of black quartz, judge my vow. " * 20
PROGRAM = (sys.executable, "-c", "from slimgrad.cli import main; main()")


@pytest.fixture
def sphinx(tmp_path: Path) -> Path:
    path = tmp_path / "sphinx.txt"
    path.write_bytes(SPHINX)
    return path


def test_fine_tuning_makes_a_run_of_its_own_and_leaves_the_first_one_alone(
    trained: Path, sphinx: Path, tmp_path: Path
) -> None:
    before, out = everything(trained), tmp_path / "tuned"
    result = succeed("finetune", trained, sphinx, "--out", out, "--steps", 3)
    assert everything(trained) == before
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert config(out)["learning_rate"] == pytest.approx(config(trained)["learning_rate"] / 10)
    first, last = result.stdout.index("before the first step  validation"), result.stdout.index("validation after")
    assert first < last
    assert "resident in this process" in result.stdout
    assert succeed("eval", out, sphinx).stdout != succeed("eval", trained, sphinx).stdout
    succeed("train", "--resume", out)


def test_fine_tuning_begins_where_the_trained_model_is(trained: Path, fox: Path, tmp_path: Path) -> None:
    shown = succeed("finetune", trained, fox, "--out", tmp_path / "tuned", "--steps", 1).stdout
    assert f"validation {rows(trained)[-1]['validation_bits']:.3f} bits/byte" in shown.split("step ")[1]


def test_a_fine_tuned_run_can_be_fine_tuned_from_its_snapshot(trained: Path, sphinx: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    succeed("finetune", snapshots(trained)[0], sphinx, "--steps", 1, "--out", first)
    succeed("finetune", first, sphinx, "--steps", 1, "--out", second, "--method", "plain", "--set", "warmup=0")
    assert config(second)["method"] == "plain"


def test_without_a_folder_the_run_is_named_after_the_text(
    trained: Path, sphinx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("finetune", trained, sphinx, "--steps", 1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sphinx-")


def test_a_model_without_a_run_is_told_where_its_numbers_come_from(trained: Path, fox: Path) -> None:
    file = snapshots(trained)[-1] / "model.safetensors"
    message = refuse(2, "finetune", file, fox)
    assert (
        f"{file} is a model without a run, which has no numbers to train with. Name a run's folder, or take" in message
    )
    assert f"slimgrad train CORPUS --init {file} --preset modern" in message


@pytest.mark.parametrize("memory", ["much", "-5MB", "5 TB", ""])
def test_a_badly_written_limit_is_refused(
    memory: str, trained: Path, sphinx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuse(2, "finetune", trained, sphinx, "--memory", memory)
    assert "expected an amount of memory such as 800MB" in message
    assert list(tmp_path.iterdir()) == [sphinx]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' data")
def test_a_limit_below_what_the_process_holds_is_refused(
    trained: Path, sphinx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refuse(2, "finetune", trained, sphinx, "--memory", "1MB")
    assert re.search(r"memory of 1\.0 MB: expected [\d,.]+ MB at least\. The process holds", message)
    message = refuse(2, "finetune", trained, sphinx, "--memory", "1MB", "--method", "plain")
    assert "memory of 1.0 MB: expected more than the" in message
    assert list(tmp_path.iterdir()) == [sphinx]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' data")
def test_a_generous_limit_is_kept_to_and_the_run_ends_well(trained: Path, sphinx: Path, tmp_path: Path) -> None:
    options = ("--memory", "4GB", "--steps", "1", "--out", str(tmp_path / "tuned"))
    done = subprocess.run([*PROGRAM, "finetune", str(trained), str(sphinx), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "tuned")) == 1


def test_memory_that_runs_out_is_one_message_and_the_run_can_go_on(
    trained: Path, sphinx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> float:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.bytelm.loop.add_gradient", refused)
        message = refuse(1, "finetune", trained, sphinx, "--out", tmp_path / "tuned", "--steps", 2)
    assert "memory ran out. A smaller --chunk" in message
    succeed("train", "--resume", tmp_path / "tuned")
    assert len(rows(tmp_path / "tuned")) == 2
