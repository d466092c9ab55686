"""Gradients that are saved on their way: the same bits as others, from wherever they are gone on with."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.measure import LiveBytes

import slimgrad as sg
from slimgrad import InputError
from slimgrad.bytelm import RunFolder, TrainConfig, train
from slimgrad.bytelm.folder import read_rows
from slimgrad.bytelm.journalled import TRACE_LINES, Pace, saved_gradient
from slimgrad.data import Corpus, load_corpus
from slimgrad.data import documents as documents_module
from slimgrad.models import PerformerConfig
from slimgrad.runs.stopping import Interrupted, Stop
from tests.bytelm.settings import TINY_MODEL, corpus, documents, flip, going_on, last_snapshot, timeless, tiny, whole

ALWAYS = Pace(first=0, costs=0, least=0)  # after every chunk
FAVOR = dataclasses.replace(TINY_MODEL, feature_map="favor", features=8, normalize=True, norm="pre")
RUNS: dict[str, dict[str, Any]] = {
    "rebuild": {},
    "of several documents": {"windows": "random"},
    "batch": {"batch": 2},
    "random features": {"model": FAVOR},
    "bf16": {"precision": "bf16"},
    "keep": {"schedule": "keep"},
    "every": {"schedule": "every:3"},
    "binomial": {"schedule": "binomial:2"},
}
TEXTS = {"of several documents": documents(700, 40, 3, 900, 500)}


class Clock:
    """In place of the real one; moves on as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StoppedError(Exception):
    """As a crash would be."""


def settings(name: str) -> tuple[TrainConfig, Corpus]:
    return tiny(steps=2, length=500, chunk=64, save_every=1, **RUNS[name]), TEXTS.get(name, corpus())


def journalled(path: Path, config: TrainConfig, text: Corpus, **how: Any) -> list[dict[str, Any]]:
    """A run in a new folder, or taken up again, that saves its gradients after every chunk."""
    how = {"pace": ALWAYS, **how}
    if (path / "config.json").exists():
        with RunFolder.reopen(path) as folder:
            return timeless(train(folder.config.replace(**how.pop("changes", {})), text, run=folder, **how).rows)
    with RunFolder.create(path, "fox", {"config": config.to_dict()}) as folder:
        return timeless(train(config, text, run=folder, **how).rows)


def at(number: int, what: Callable[[], None]) -> sg.OnChunk:
    """Does something after the chunk of that number."""
    count = 0

    def hear(_: sg.Event) -> None:
        nonlocal count
        count += 1
        if count == number:
            what()

    return hear


def crash() -> None:
    raise StoppedError


def crashed(path: Path, config: TrainConfig, text: Corpus, number: int) -> Path:
    """A run that ended after so many chunks, and what it saved of the gradient."""
    with pytest.raises(StoppedError):
        journalled(path, config, text, on_chunk=at(number, crash))
    (saved,) = (path / "gradient").iterdir()
    return saved


@pytest.mark.parametrize("name", RUNS)
def test_saved_or_crashed_in_either_sweep_it_is_the_same_in_every_bit(name: str, tmp_path: Path) -> None:
    config, text = settings(name)
    expected = whole(tmp_path / "whole", config, text)
    assert timeless(train(config, text).rows) == timeless(expected)
    assert not (tmp_path / "whole" / "traces").exists()
    assert journalled(tmp_path / "saved", config, text) == timeless(expected)
    crashed(tmp_path / "run", config, text, 5)
    for later in (8, 12):  # in the second sweep, and in the next step
        with pytest.raises(StoppedError):
            journalled(tmp_path / "run", config, text, on_chunk=at(later, crash))
    assert journalled(tmp_path / "run", config, text) == timeless(expected)
    for path in (tmp_path / "saved", tmp_path / "run"):
        assert last_snapshot(path) == last_snapshot(tmp_path / "whole")
        assert not (path / "gradient").exists()
        assert len(list((path / "traces").iterdir())) == 2


def test_of_several_batches_and_documents_none_is_saved(tmp_path: Path) -> None:
    for number, changes in enumerate(({"accumulate": 2}, {"windows": "documents"}, {"method": "checkpoint"})):
        config = tiny(steps=1, **changes)
        expected = train(config, documents(300, 500, 400)).rows
        assert journalled(tmp_path / str(number), config, documents(300, 500, 400)) == timeless(expected)
        assert not (tmp_path / str(number) / "traces").exists()


def test_the_snapshot_before_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that goes on would find a gradient of a step that it has still to come to."""
    config = tiny(steps=4, length=500, chunk=64, save_every=100)
    expected = whole(tmp_path / "whole", config, corpus())
    clock, count = Clock(), 0
    monkeypatch.setattr("slimgrad.bytelm.journalled.perf_counter", clock)

    def hear(_: sg.Event) -> None:  # the third step, of chunks 31 to 45, takes long
        nonlocal count
        count += 1
        clock.now += 100 if count == 35 else 0
        if count == 40:
            crash()

    with pytest.raises(StoppedError):
        journalled(tmp_path / "run", config, corpus(), pace=Pace(), on_chunk=hear)
    assert sorted(path.name for path in (tmp_path / "run/snapshots").iterdir()) == ["step-00000000", "step-00000002"]
    assert saved_gradient(tmp_path / "run", 3) is not None
    assert journalled(tmp_path / "run", config, corpus()) == timeless(expected)


def test_a_step_that_took_long_is_on_the_disk_when_it_is_done(tmp_path: Path) -> None:
    config = tiny(steps=2, length=500, chunk=64, save_every=100)
    with pytest.raises(StoppedError):
        journalled(tmp_path / "run", config, corpus(), on_chunk=at(16, crash))
    assert "step-00000001" in {path.name for path in (tmp_path / "run" / "snapshots").iterdir()}
    assert not (tmp_path / "run" / "gradient").exists()


def test_what_was_saved_stays_until_the_snapshot_after_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=2, length=500, chunk=64, save_every=100, eval_every=1)
    expected = whole(tmp_path / "whole", config, corpus())
    with monkeypatch.context() as patch:
        patch.setattr("slimgrad.bytelm.loop.validate", lambda *_: crash())
        with pytest.raises(StoppedError):
            journalled(tmp_path / "run", config, corpus())
    left = list[sg.Event]()
    assert journalled(tmp_path / "run", config, corpus(), on_chunk=left.append) == timeless(expected)
    assert len(left) == 1 + 15


def test_the_trace_says_how_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=1, length=500, chunk=64)
    saved = crashed(tmp_path / "run", config, corpus(), 10)
    before = [json.loads(x) for x in (tmp_path / "run/traces/step-00000001.jsonl").read_text().splitlines()]
    journalled(tmp_path / "run", config, corpus())
    lines = [json.loads(x) for x in (tmp_path / "run/traces" / f"{saved.name}.jsonl").read_text().splitlines()]
    assert lines[: len(before)] == before
    forward, back = lines[:7], lines[7:]  # the last chunk is not run forward
    assert [x["position"] for x in forward] == list(range(64, 449, 64))
    assert [x["position"] for x in back] == list(range(448, -1, -64))
    assert [x["phase"] for x in lines] == ["forward"] * 7 + ["reverse"] * 8
    assert [x["tokens"] for x in lines] == sorted({x["tokens"] for x in lines})
    assert [x["seconds"] for x in lines] == sorted(x["seconds"] for x in lines)
    assert all(x["resident_bytes"] > 1e6 for x in lines)
    assert all(x["adjoint_norm"] > 0 for x in back)
    monkeypatch.setattr("slimgrad.bytelm.journalled.TRACE_LINES", 6)
    journalled(tmp_path / "thin", config, corpus())
    thin = (tmp_path / "thin/traces/step-00000001.jsonl").read_text().splitlines()
    assert 4 <= len(thin) <= 7
    assert TRACE_LINES == 2000


# --- when ---


def test_the_first_save_and_those_after_it_come_when_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saves, save = Clock(), list[float](), sg.Segment.save

    def slow(self: sg.Segment, folder: Path) -> None:
        saves.append(clock.now)
        save(self, folder)
        clock.now += 0.5

    def tick(_: sg.Event) -> None:
        clock.now += 10

    monkeypatch.setattr("slimgrad.bytelm.journalled.perf_counter", clock)
    monkeypatch.setattr(sg.Segment, "save", slow)
    config = tiny(steps=1, length=500, chunk=16)  # 31 + 32 chunks
    journalled(tmp_path / "run", config, corpus(), pace=Pace(), on_chunk=tick)
    # 60 s, then at least 25 s after the end of each
    assert saves[0] == 60
    assert [round(b - a, 3) for a, b in itertools.pairwise(saves)] == [30.5] * (len(saves) - 1)
    assert len(saves) == 19


# --- signals ---


@pytest.mark.skipif(os.name != "posix", reason="os.kill delivers signals on POSIX alone")
@pytest.mark.parametrize("number", [5, 10])
def test_a_signal_saves_a_gradient_that_has_taken_long(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=1, length=500, chunk=64)
    expected = whole(tmp_path / "whole", config, corpus())
    clock = Clock()
    monkeypatch.setattr("slimgrad.bytelm.journalled.perf_counter", clock)

    def interrupt() -> None:
        clock.now += 2
        os.kill(os.getpid(), signal.SIGTERM)

    stop = Stop()
    with stop.listening(), pytest.raises(Interrupted, match="SIGTERM") as raised:
        journalled(tmp_path / "run", config, corpus(), pace=Pace(), stop=stop, on_chunk=at(number, interrupt))
    share = {5: 5 * 64 / 1000, 10: (1000 - 320) / 1000}[number]
    assert raised.value.__notes__ == [f"the gradient at hand is saved, {share:.0%} of it done"]
    assert saved_gradient(tmp_path / "run", 1) is not None
    left = list[sg.Event]()
    assert journalled(tmp_path / "run", config, corpus(), pace=Pace(), on_chunk=left.append) == timeless(expected)
    assert len(left) == 15 - number
    assert last_snapshot(tmp_path / "run") == last_snapshot(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="os.kill delivers signals on POSIX alone")
def test_a_signal_in_a_short_gradient_saves_none_of_it(tmp_path: Path) -> None:
    stop, config = Stop(), tiny(steps=1, length=500, chunk=64)
    hear = at(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with stop.listening(), pytest.raises(Interrupted, match="SIGINT") as raised:
        journalled(tmp_path / "run", config, corpus(), pace=Pace(), stop=stop, on_chunk=hear)
    assert not hasattr(raised.value, "__notes__")
    assert saved_gradient(tmp_path / "run", 1) is None


@pytest.mark.skipif(os.name != "posix", reason="os.kill delivers signals on POSIX alone")
def test_a_signal_after_the_last_chunk_comes_too_late_to_lose_anything(tmp_path: Path) -> None:
    stop, config = Stop(), tiny(steps=2, length=500, chunk=64)
    hear = at(15, lambda: os.kill(os.getpid(), signal.SIGINT))
    with stop.listening(), pytest.raises(Interrupted):
        journalled(tmp_path / "run", config, corpus(), pace=Pace(), stop=stop, on_chunk=hear)
    assert [row.step for row in read_rows(tmp_path / "run")] == [1]


# --- gone on with in another way, or not at all ---


def test_how_gradients_are_computed_may_change_from_the_next_one_on(tmp_path: Path) -> None:
    config = tiny(steps=2, length=500, chunk=64, save_every=1)
    expected = whole(tmp_path / "whole", config, corpus())
    crashed(tmp_path / "run", config, corpus(), 5)
    chunks = list[int]()
    rows = journalled(
        tmp_path / "run", config, corpus(), changes={"chunk": 100, "schedule": "keep"},
        on_chunk=lambda event: chunks.append(event.stop - event.start),
    )  # fmt: skip
    assert rows[0] == timeless(expected)[0]
    assert chunks == [64] * 3 + [52] + [64] * 7 + [100] * 9  # the fifth was not saved yet
    assert rows[1]["bits"] == pytest.approx(expected[1].bits, abs=1e-5)


def test_another_method_is_refused_until_the_step_is_done(tmp_path: Path) -> None:
    config, text = settings("rebuild")
    expected = whole(tmp_path / "whole", config, text)
    saved = crashed(tmp_path / "run", config, text, 10)
    message = rf"{saved}: expected to go on with the gradient of step 1, .* got plain\. .* remove {saved.parent} to"
    with pytest.raises(InputError, match=message):
        journalled(tmp_path / "run", config, text, changes={"method": "plain"})
    assert journalled(tmp_path / "run", config, text) == timeless(expected)


def test_what_was_saved_of_another_step_is_dropped(tmp_path: Path) -> None:
    config = tiny(steps=3, length=500, chunk=64, save_every=1)
    expected = whole(tmp_path / "whole", config, corpus())
    assert crashed(tmp_path / "run", config, corpus(), 40).name == "step-00000003"
    with RunFolder.reopen(tmp_path / "run" / "snapshots" / "step-00000001") as folder, pytest.raises(StoppedError):
        train(folder.config, corpus(), run=folder, on_chunk=at(1, crash))
    assert list((tmp_path / "run" / "gradient").iterdir()) == []
    assert timeless(going_on(tmp_path / "run", corpus())) == timeless(expected)


@pytest.mark.parametrize("harm", [flip, lambda file: os.truncate(file, 1000), Path.unlink])
def test_a_damaged_save_is_named_and_the_way_out_too(harm: Callable[[Path], None], tmp_path: Path) -> None:
    config, text = settings("rebuild")
    expected = whole(tmp_path / "whole", config, text)
    saved = crashed(tmp_path / "run", config, text, 10)
    (file,) = saved.glob("progress-*")
    harm(file)
    with pytest.raises(InputError, match=rf"{saved}.*\. To begin this gradient anew, remove {saved.parent}$") as raised:
        journalled(tmp_path / "run", config, text)
    assert file.name in str(raised.value)
    for left in saved.iterdir():
        left.unlink()
    assert journalled(tmp_path / "run", config, text) == timeless(expected)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    config, text = settings("rebuild")
    crashed(tmp_path / "run", config, text, 10)
    other = train(config.replace(steps=1), text).model.state_dict()
    snapshot = tmp_path / "run" / "snapshots"
    snapshot.rename(tmp_path / "snapshots")  # the run begins anew, with weights of its own
    with pytest.raises(
        InputError, match=r"saved with something else: parameter .* To begin this gradient anew, remove"
    ):
        journalled(tmp_path / "run", config, text, weights=other)


# --- no room ---


@pytest.mark.parametrize("saves", [0, 3])
def test_a_full_disk_loses_nothing(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gradient goes on; what was saved before it is there, and the run can go on from that too."""
    config, text = settings("rebuild")
    expected = whole(tmp_path / "whole", config, text)
    from slimgrad.call import saving

    push, count, found = saving.push_to_disk, 0, list[str]()

    def full(path: Path) -> None:
        nonlocal count
        count += path.name.startswith(".partial")
        if count > saves:
            raise OSError(errno.ENOSPC, "No space left on device")
        push(path)

    monkeypatch.setattr(saving, "push_to_disk", full)

    def look() -> None:
        found.extend(path.name for path in (tmp_path / "run").glob("gradient/*/*"))
        crash()

    with pytest.raises(StoppedError):
        journalled(tmp_path / "run", config, text, on_chunk=at(10, look))
    words = "what was saved of it before is as it was" if saves else "nothing is saved of it yet"
    assert words in caplog.text
    assert "No space left on device. Free some space. The gradient goes on" in caplog.text
    assert len(found) == (2 if saves else 0)
    assert journalled(tmp_path / "run", config, text) == timeless(expected)  # still full
    monkeypatch.undo()
    assert last_snapshot(tmp_path / "run") == last_snapshot(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_to_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, text = settings("rebuild")
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **how: Any) -> None:  # not through rights: some may write everywhere
        if self.parent.name == "gradient":
            raise PermissionError(errno.EACCES, "Permission denied")
        make(self, *args, **how)

    monkeypatch.setattr(Path, "mkdir", refuse)
    rows = journalled(tmp_path / "run", config, text)
    assert rows == timeless(train(config, text).rows)
    assert "step-00000001: expected to write it, got: Permission denied" in caplog.text


# --- as long as may be ---


def test_memory_does_not_depend_on_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a byte, of a text in several files."""
    monkeypatch.setattr(documents_module, "AT_ONCE", 1 << 10)
    peaks = list[int]()
    for length in (10_000, 30_000):
        folder = tmp_path / str(length)
        folder.mkdir()
        for number in range(10):
            with (folder / str(number)).open("wb") as file:
                file.truncate(length // 10 + (20 if number == 9 else 0))
        model = PerformerConfig(layers=1, width=8, heads=1)
        config = tiny(model=model, length=length, chunk=500, steps=1, validation_bytes=20)
        with LiveBytes() as live:
            journalled(folder / ".run", config, load_corpus(folder), pace=Pace())
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 1e6
