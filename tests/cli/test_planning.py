"""`slimgrad plan`, and `--memory` in place of a chunk: what is chosen, kept to, said, and gone on with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimgrad.budget.plan import Plan
from slimgrad.budget.process import resident_bytes
from slimgrad.cli.budgeted import keep_within
from slimgrad.cli.ways import Point, Ways, picture_ways, sketch_ways
from tests.cli.running import FOX, SHAPE, config, everything, measured, refuse, rows, succeed

PROGRAM = (sys.executable, "-c", "from slimgrad.cli import main; main()")
BUDGETED = (*SHAPE, "--length", 500, "--set", "first_length=0", "--learning-rate", 0.01, "--steps", 2)


@pytest.fixture(autouse=True)
def _this_process_goes_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does to its own process for good, it does not do to that of the tests."""
    monkeypatch.setattr("slimgrad.cli.budgeted.set_wall", lambda *_, **__: None)
    for module in ("budgeted", "planning"):
        monkeypatch.setattr(f"slimgrad.cli.{module}.let_plans_set_malloc", lambda: False)
        monkeypatch.setattr(f"slimgrad.cli.{module}.load_what_loads_late", lambda: None)


@pytest.fixture
def memory() -> str:
    """More than the tests' own process holds."""
    return f"{(resident_bytes() or 0) // 1_000_000 + 300}MB"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_plan_is_printed_with_its_account_and_drawn(trained: Path, tmp_path: Path, memory: str) -> None:
    out = tmp_path / "plan.png"
    before = everything(trained)
    shown = succeed("plan", trained, "--length", 3000, "--memory", memory, "--chunk", 200, "--out", out).stdout
    assert everything(trained) == before
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "one gradient over 3,000 tokens" in shown
    assert re.search(r"tokens per second; at most [\d,.]+ MB of [\d,.]+ MB", shown)
    table = dict(re.findall(r"^([a-z ]+?) {2,}([\d,.]+) +[\d.]+%", shown, re.MULTILINE))
    total = float(table.pop("all of it").replace(",", ""))
    assert {"weights", "optimiser", "gradients", "one chunk", "allocator"} <= set(table)
    assert sum(float(x.replace(",", "")) for x in table.values()) == pytest.approx(total, abs=0.05 * len(table))
    assert "the largest of those that fit and are within 3 % of the fastest" in shown
    assert "--chunk 200: " in shown
    assert "MB, chunk 200" in shown
    assert shown.count("== plain backpropagation") == 2
    assert "extrapolated, by a straight line through 256 and 512 tokens" in shown


def test_the_drawings_have_every_way() -> None:
    ways = Ways(
        chunks={16: Point(10.0, 900.0), 64: Point(20.0, 30.0), 256: Point(300.0, 20.0)},
        marked={"chosen": (64, Point(20.0, 30.0))},
        others={"plain backpropagation": Point(2000.0, 10.0)},
        budget=100.0,
        title="a title",
    )
    memory, seconds = "\n".join(sketch_ways(ways, height=8)).split("seconds over the chunk")
    drawn = [line for line in memory.splitlines() if line.startswith("|")]
    assert ["=" in line for line in drawn] == [True] + 7 * [False]
    level = [i for i, line in enumerate(drawn) if "." in line.partition("|")[2]]
    chosen = [i for i, line in enumerate(drawn) if "O" in line]
    assert len(chosen) == 1
    assert level[0] < chosen[0]
    assert memory.isascii()
    assert "budget" not in seconds
    assert picture_ways(ways).startswith(b"\x89PNG")


def test_training_within_a_budget_is_training_in_the_chunks_of_its_plan(
    fox: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, same = tmp_path / "budgeted", tmp_path / "chunked"
    shown = succeed("train", fox, *BUDGETED, "--memory", memory, "--out", out).stdout
    saved = record(out)
    plan = Plan.from_dict(saved["plan"])
    chosen = config(out)
    assert (chosen["chunk"], chosen["memory"]) == (plan.chunk, memory)
    assert plan.length == 500
    assert plan.peak <= plan.memory
    assert "the largest of those that fit" in shown
    assert re.search(r"Memory: at most [\d,]+ MB resident, of [\d,]+ MB; predicted [\d,]+ MB", shown)
    succeed("train", fox, *BUDGETED, "--chunk", plan.chunk, "--schedule", chosen["schedule"], "--out", same)
    assert measured(same) == measured(out)
    assert "plan" not in record(same)

    def no_plan(*_: object) -> None:
        raise AssertionError("the plan that is there was to be used")

    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.cli.budgeted.plan_run", no_plan)
        succeed("train", "--resume", out)
    assert record(out)["plan"] == saved["plan"]
    assert config(out) == chosen


def test_going_on_a_chunk_takes_the_place_of_the_budget_and_a_budget_that_of_the_chunk(
    fox: Path, tmp_path: Path, memory: str
) -> None:
    out = tmp_path / "run"
    succeed("train", fox, *BUDGETED, "--memory", memory, "--out", out)
    assert config(out)["schedule"] != "auto"
    succeed("train", "--resume", out, "--chunk", 40)
    assert {name: config(out)[name] for name in ("chunk", "memory", "schedule")} == {
        "chunk": 40, "memory": None, "schedule": "auto",
    }  # fmt: skip
    assert "plan" not in record(out)
    succeed("train", "--resume", out, "--memory", memory, "--schedule", "rebuild")
    assert config(out)["memory"] == memory
    assert record(out)["plan"]["schedule"].startswith("rebuild")
    assert [session["memory"] for session in record(out)["sessions"]] == [memory, None, memory]


def test_with_a_budget_malloc_is_set_first_and_the_wall_last(monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    done: list[Any] = []
    monkeypatch.setattr("slimgrad.cli.budgeted.let_plans_set_malloc", lambda: done.append("malloc"))
    monkeypatch.setattr("slimgrad.cli.budgeted.load_what_loads_late", lambda: done.append("loaded"))
    monkeypatch.setattr("slimgrad.cli.budgeted.set_wall", lambda budget, *, has_plan: done.append((budget, has_plan)))
    num_bytes = int(memory.removesuffix("MB")) * 1_000_000
    keep_within(memory, "cpu", has_plan=False)
    keep_within(memory, "cpu", trains=False)
    keep_within("1MB", "cpu")
    keep_within(None, "cpu")
    assert done == ["malloc", "loaded", (num_bytes, False), "malloc", (num_bytes, True)]


def test_of_documents_the_longest_is_planned_for(documents: Path, tmp_path: Path, memory: str) -> None:
    out = tmp_path / "run"
    shape = (*SHAPE, "--windows", "documents", "--set", "validation_bytes=90", "--steps", 2, "--batch", 2)
    succeed("train", documents, *shape, "--memory", memory, "--out", out)
    assert record(out)["plan"]["length"] == config(out)["length"]
    assert len(rows(out)) == 2


def test_an_evaluation_within_a_budget_finds_the_same(trained: Path, fox: Path, memory: str) -> None:
    shown = succeed("eval", trained, fox, "--memory", memory).stdout
    assert re.search(r"at most [\d,]+ MB resident, of [\d,]+ MB; predicted", shown)
    bits = shown.split(" bits")[0]
    assert succeed("eval", trained, fox).stdout.split(" bits")[0] == bits
    assert succeed("eval", trained, "-", "--memory", memory, stdin=FOX).stdout.split(" bits")[0] == bits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "modern", "--length", 64, "--memory", "1MiB"), "memory of 1.0 MB: expected"),
        (("plan", "modern", "--memory", "1 TB"), "expected an amount of memory such as"),
        (("plan", "nothing"), "nothing: expected one of the presets I, II, III, IV, copying, ptb, enwik8, modern, or"),
        (("plan", "modern", "--length", 64, "--chunk", 65), "--chunk 65: expected 1 to 64"),
        (("plan", "modern", "--out", "missing/plan.png"), "expected a folder to write to"),
        (("train", "FOX", *BUDGETED, "--memory", "1MiB"), "memory of 1.0 MB: expected"),
        (("train", "FOX", *BUDGETED, "--memory", "1MiB", "--method", "plain"), "memory of 1.0 MB: expected more than"),
        (("train", "FOX", *BUDGETED, "--memory", "1GiB", "--chunk", 8), "--chunk and --memory: expected one of them"),
        (("train", "FOX", "--memory", "1GiB", "--set", "chunk=8"), "--chunk and --memory: expected one of them"),
        (("finetune", "RUN", "FOX", "--memory", "1GiB", "--chunk", 8), "--chunk and --memory: expected one of them"),
        (("train", "--resume", "RUN", "--memory", "1GiB", "--chunk", 8), "--chunk and --memory: expected one of them"),
        (("train", "--resume", "RUN", "--memory", "1MiB"), "memory of 1.0 MB: expected"),
        (("eval", "RUN", "FOX", "--memory", "1GiB", "--chunk", 8), "--chunk and --memory: expected one of them"),
        (("eval", "RUN", "FOX", "--memory", "1MiB"), "memory of 1.0 MB: expected"),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: tuple[object, ...], message: str, trained: Path, fox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = everything(trained)
    given = [{"RUN": trained, "FOX": fox}.get(word, word) if isinstance(word, str) else word for word in words]
    assert message in refuse(2, *given)
    assert everything(trained) == before
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_run_needs_a_length(trained: Path) -> None:
    (model, *_) = sorted(trained.glob("snapshots/*/model.safetensors"))
    assert "expected --length beside it" in refuse(2, "plan", model, "--memory", "1GiB")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is measured and limited on Linux")
def test_a_process_of_its_own_keeps_to_its_budget(trained: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "run"
    text.write_bytes(FOX * 20)
    words = ("finetune", trained, text, "--memory", "600MB", "--length", 20_000, "--steps", 1, "--out", out)
    done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.search(r"Memory: at most ([\d,]+) MB resident, of ([\d,]+) MB; predicted ([\d,]+) MB", done.stdout)
    assert found, done.stdout
    peak, budget, predicted = (int(number.replace(",", "")) for number in found.groups())
    assert peak <= predicted <= budget == 600
    assert len(rows(out)) == 1
