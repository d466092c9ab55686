"""`slimgrad train`: what it leaves behind, and its options."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from slimgrad.bytelm import Cost, TrainConfig, build_model, open_model
from slimgrad.cli.curve import picture
from slimgrad.cli.session import SAMPLE_BYTES
from tests.cli.running import (
    FOX,
    LENGTH,
    SHAPE,
    SIZE,
    TINY,
    config,
    everything,
    measured,
    refuse,
    rows,
    run,
    snapshots,
    succeed,
)


def test_training_leaves_everything_in_a_new_folder(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimgrad.cli.session.picture", picture)
    monkeypatch.setattr("slimgrad.cli.session.SAMPLE_BYTES", SAMPLE_BYTES)
    out = tmp_path / "deep" / "run"
    result = succeed("train", fox, *TINY, "--set", "first_length=16", "--out", out)
    names = {"config.json", "metrics.jsonl", "snapshots", "curve.png", "sample.txt", "memory.json"}
    assert {path.name for path in out.iterdir()} - {".lock"} == names
    assert [row["length"] for row in rows(out)] == [16, 16, 16, 32, 32, 64]
    assert math.isfinite(rows(out)[-1]["validation_bits"])
    assert config(out)["steps"] == 6
    assert [path.name for path in snapshots(out)] == ["step-00000004", "step-00000006"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) > 600
    assert json.loads((out / "memory.json").read_text()).keys() == {"length", "slimgrad", "plain"}
    for word in ("corpus", "chunk", "schedule", "validation", "Sample", "plain backpropagation", "left", str(out)):
        assert word in result.stdout.replace("\n", "")
    assert result.stderr == ""


def test_the_recorded_settings_are_the_ones_that_were_shown(trained: Path, fox: Path) -> None:
    record = json.loads((trained / "config.json").read_text())
    assert record["settings"]["corpus"].startswith(f"fox: {len(FOX):,} bytes from {fox}")
    assert record["corpus"]["given"] == str(fox)
    assert record["origin"] == "preset modern"
    assert [session["after_step"] for session in record["sessions"]] == [0]


def test_without_a_corpus_or_a_folder_it_trains_on_python_s_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("train", *SHAPE, *SIZE, "--steps", 1, "--set", "validation_bytes=64")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pydocs-")
    assert config(folder)["validation_bytes"] == 64


def test_the_same_seed_gives_the_same_run_and_another_seed_another_one(
    trained: Path, fox: Path, tmp_path: Path
) -> None:
    succeed("train", fox, *TINY, "--out", tmp_path / "same")
    succeed("train", fox, *TINY, "--seed", 1, "--out", tmp_path / "other")
    assert measured(tmp_path / "same") == measured(trained)
    assert measured(tmp_path / "other") != measured(trained)


@pytest.mark.parametrize(
    "how",
    [
        ("--method", "plain"),
        ("--method", "checkpoint"),
        ("--schedule", "keep"),
        ("--schedule", "every:2"),
        ("--schedule", "binomial:2@disk"),
        ("--schedule", "rebuild"),
    ],
)
def test_every_way_to_compute_a_gradient_gives_the_same_losses(
    how: tuple[str, str], trained: Path, fox: Path, tmp_path: Path
) -> None:
    result = succeed("train", fox, *TINY, *how, "--out", tmp_path / "run")
    bits = [row["bits"] for row in rows(tmp_path / "run")]
    assert bits == pytest.approx([row["bits"] for row in rows(trained)], rel=1e-4)
    assert config(tmp_path / "run")[how[0].removeprefix("--")] == how[1]
    if how[0] == "--method":
        assert f"{how[1]}: memory grows with the length" in result.stdout
        assert not (tmp_path / "run" / "memory.json").exists()


def test_a_schedule_may_keep_its_states_in_a_folder_that_it_leaves_empty(fox: Path, tmp_path: Path) -> None:
    store = tmp_path / "states"
    store.mkdir()
    succeed("train", fox, *TINY, "--schedule", f"keep@{store}", "--out", tmp_path / "run")
    assert list(store.iterdir()) == []


def test_a_schedule_whose_folder_is_not_there_is_refused_before_a_run(fox: Path, mine: Path, tmp_path: Path) -> None:
    absent, before = tmp_path / "absent", everything(mine)
    for command in (["train", fox, *TINY, "--out", tmp_path / "run"], ["train", "--resume", mine]):
        message = refuse(2, *command, "--schedule", f"keep@{absent}")
        assert f"expected a folder to write to, found none at {absent}. Make it first" in message
    assert not (tmp_path / "run").exists()
    assert everything(mine) == before


def test_options_reach_the_run(fox: Path, tmp_path: Path) -> None:
    options = ("--batch", 2, "--accumulate", 2, "--windows", "random", "--precision", "bf16", "--eval-every", 3)
    succeed("train", fox, *TINY, *options, "--device", "cpu", "--set", "decay=constant", "--out", tmp_path / "run")
    found = config(tmp_path / "run")
    assert (found["batch"], found["accumulate"], found["windows"], found["precision"]) == (2, 2, "random", "bf16")
    assert found["decay"] == "constant"
    assert {row["num_bytes"] for row in rows(tmp_path / "run")} == {4 * LENGTH}
    assert [row["step"] for row in rows(tmp_path / "run") if row["validation_bits"] is not None] == [3, 6]


def test_set_takes_none_and_the_other_spellings_of_json(fox: Path, tmp_path: Path) -> None:
    settings = ("--set", "clip_norm=none", "--set", "betas=[0.5, 0.6]", "--set", "weight_decay=0")
    succeed("train", fox, *TINY, *settings, "--out", tmp_path / "run")
    found = config(tmp_path / "run")
    assert (found["clip_norm"], found["betas"], found["weight_decay"]) == (None, [0.5, 0.6], 0)


def test_whole_documents_of_a_folder_have_their_own_lengths(documents: Path, tmp_path: Path) -> None:
    options = (*SHAPE, "--chunk", 16, "--steps", 3, "--windows", "documents", "--set", "first_length=0")
    result = succeed("train", documents, *options, "--set", "validation_bytes=100", "--out", tmp_path / "run")
    assert "whole documents of up to" in result.stdout
    assert "4 files below" in result.stdout
    longest = config(tmp_path / "run")["length"]
    assert all(row["length"] <= longest for row in rows(tmp_path / "run"))
    assert len({row["length"] for row in rows(tmp_path / "run")}) > 1


def test_copying_needs_no_text(tmp_path: Path) -> None:
    shape = ("--preset", "copying", "--set", "model.width=32", "--set", "model.heads=2")
    result = succeed("train", "copying", *shape, "--length", 32, "--steps", 3, "--out", tmp_path / "run")
    assert "copying: sequences of 32 symbols" in result.stdout
    assert len(rows(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "sample.txt").exists()


def test_what_one_gradient_takes_is_shown_and_kept(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(*_: object, method: str, **__: object) -> Cost:
        return Cost(peak_bytes=2_000_000 if method == "chunked" else 9_000_000, seconds=1.0)

    monkeypatch.setattr("slimgrad.cli.session.measure_gradient", cost)
    result = succeed("train", fox, *TINY, "--out", tmp_path / "run")
    assert "the same gradient in 1/4.5 of the memory" in result.stdout
    kept = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert (kept["length"], kept["plain"]["peak_bytes"]) == (LENGTH, 9_000_000)


def test_a_way_that_cannot_be_measured_says_why(fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "the measuring process ended: exit status -9"
    lost = Cost(peak_bytes=None, seconds=math.nan, note=note)
    monkeypatch.setattr("slimgrad.cli.session.measure_gradient", lambda *_, **__: lost)
    assert note in succeed("train", fox, *TINY, "--out", tmp_path / "run").stdout


def test_a_run_begins_with_the_model_of_another_one(trained: Path, fox: Path, tmp_path: Path) -> None:
    last = snapshots(trained)[-1]
    more = ("--steps", 2, "--learning-rate", 1e-9)
    for number, source in enumerate((trained, last)):
        out = tmp_path / f"run{number}"
        result = succeed("train", fox, "--init", source, *more, "--out", out)
        assert str(source) in result.stdout.replace("\n", "").replace(" ", "")
        assert config(out)["model"] == config(trained)["model"]
        assert config(out)["length"] == LENGTH
        before, after = rows(trained)[-1]["validation_bits"], rows(out)[-1]["validation_bits"]
        assert after == pytest.approx(before, rel=1e-4)


def test_a_model_s_file_needs_a_preset_beside_it(
    trained: Path, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = snapshots(trained)[-1] / "model.safetensors"
    assert f"--init {file} --preset modern" in refuse(2, "train", fox, "--init", file)
    assert "another shape" in refuse(2, "train", fox, "--init", file, "--preset", "modern")
    assert list(tmp_path.iterdir()) == []


def test_a_model_s_file_with_its_preset_begins_a_run(
    fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimgrad.bytelm.presets import PRESETS
    from slimgrad.models import PerformerConfig

    shape = PerformerConfig(layers=1, width=16, heads=2)
    small = TrainConfig(model=shape, length=64, learning_rate=1e-3, chunk=32, steps=2)
    monkeypatch.setitem(PRESETS, "modern", small)
    succeed("train", fox, "--out", tmp_path / "first")
    file = snapshots(tmp_path / "first")[-1] / "model.safetensors"
    succeed("train", fox, "--init", file, "--preset", "modern", "--out", tmp_path / "second")
    assert len(rows(tmp_path / "second")) == 2
    refused = run("train", fox, "--init", file, "--preset", "modern", "--set", "model.width=32")
    assert refused.exit_code == 2


def test_a_run_that_began_with_a_model_needs_it_no_more(trained: Path, fox: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    succeed("train", fox, "--init", trained, "--steps", 1, "--out", out)
    text = (out / "config.json").read_text().replace(str(trained), str(tmp_path / "gone"))
    (out / "config.json").write_text(text)
    succeed("train", "--resume", out)
    assert open_model(out)[1] is not None


def test_the_whole_text_is_one_sequence(documents: Path, tmp_path: Path) -> None:
    """Documents are one after the other; growth does not apply, though the preset has it; the number is recorded."""
    num_bytes = sum(path.stat().st_size for path in documents.iterdir())
    train_bytes = num_bytes - num_bytes // 10
    shape = (*SHAPE, "--chunk", 16, "--steps", 1, "--out", tmp_path / "run")
    result = succeed("train", documents, "--length", "all", "--validation", "end", *shape)
    assert f"1 step, each the whole training text of {train_bytes:,} bytes as one sequence" in result.stdout
    (row,) = rows(tmp_path / "run")
    assert (row["length"], row["num_bytes"]) == (train_bytes, train_bytes)
    assert {name: config(tmp_path / "run")[name] for name in ("length", "first_length")} == {
        "length": train_bytes,
        "first_length": 0,
    }
    text = b"".join(path.read_bytes() for path in sorted(documents.iterdir()))[:train_bytes]
    model = build_model(TrainConfig.from_dict(config(tmp_path / "run")))
    logits, _ = model(torch.frombuffer(bytearray(text), dtype=torch.uint8)[None], model.initial_state(1))
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(list(text[1:])))
    assert row["bits"] == pytest.approx(float(loss.detach()) / math.log(2), rel=1e-5)


def test_a_model_is_adapted_to_a_whole_text_too(fox: Path, trained: Path, tmp_path: Path) -> None:
    succeed("finetune", trained, fox, "--length", "all", "--steps", 1, "--out", tmp_path / "run")
    assert [row["num_bytes"] for row in rows(tmp_path / "run")] == [len(FOX) - len(FOX) // 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 2), "expected --batch 1 and --accumulate 1, got 2 and 1"),
        (("--accumulate", 3), "expected --batch 1 and --accumulate 1, got 1 and 3"),
        (("--windows", "documents"), "--length all: expected none with --windows documents"),
    ],
)
def test_the_whole_text_once_and_no_other_way(options: tuple[object, ...], message: str, fox: Path) -> None:
    assert message in refuse(2, "train", fox, "--length", "all", *options)
    assert "the copying task has none" in refuse(2, "train", "copying", "--preset", "copying", "--length", "all")
    assert run("train", fox, "--length", "every").exit_code == 2
