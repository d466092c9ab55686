"""Real signals: a short gradient is thrown away, everything else is finished, what was done is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimgrad.bytelm import RunFolder, TrainConfig, loop, train
from slimgrad.bytelm.folder import read_rows
from slimgrad.runs.stopping import Interrupted, Stop
from tests.bytelm.settings import corpus, going_on, last_snapshot, timeless, tiny, whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="os.kill delivers signals on POSIX alone")


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def calling(function: Callable[..., Any], at: int, what: Callable[[], None]) -> Callable[..., Any]:
    """The function, with something that happens just before its call number `at` returns (negative: begins)."""
    calls = 0

    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == -at:
            what()
        result = function(*arguments, **options)
        if calls == at:
            what()
        return result

    return called


def stopped(path: Path, config: TrainConfig) -> Interrupted:
    """A run that a signal stops."""
    stop = Stop()
    with (
        pytest.raises(Interrupted) as raised,
        RunFolder.create(path, "fox", {"config": config.to_dict()}) as folder,
        stop.listening(),
    ):
        train(config, corpus(), run=folder, stop=stop)
    return raised.value


@pytest.mark.parametrize(
    ("number", "changes"),
    [(signal.SIGINT, {}), (signal.SIGTERM, {"accumulate": 2}), (signal.SIGINT, {"method": "checkpoint"})],
)
def test_a_signal_in_a_gradient_saves_the_last_whole_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, changes: dict[str, Any]
) -> None:
    config = tiny(steps=6, save_every=100, **changes)
    expected = whole(tmp_path / "whole", config, corpus())
    last_call_of_fourth_step = -4 * config.accumulate
    monkeypatch.setattr(
        loop, "add_gradient", calling(loop.add_gradient, last_call_of_fourth_step, lambda: send(number))
    )
    before = signal.getsignal(number)
    assert stopped(tmp_path / "run", config).signal_number == number
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert [row.step for row in read_rows(tmp_path / "run")] == [1, 2, 3]
    with RunFolder.reopen(tmp_path / "run") as folder:
        assert folder.snapshot is not None
        assert folder.snapshot.step == 3
    assert timeless(going_on(tmp_path / "run", corpus())) == timeless(expected)
    assert last_snapshot(tmp_path / "run") == last_snapshot(tmp_path / "whole")


def test_a_gradient_that_is_done_makes_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=6, save_every=100)
    expected = whole(tmp_path / "whole", config, corpus())
    monkeypatch.setattr(loop, "add_gradient", calling(loop.add_gradient, 4, send))
    stopped(tmp_path / "run", config)
    assert timeless(read_rows(tmp_path / "run")) == timeless(expected[:4])


def test_a_validation_is_finished_before_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=6, eval_every=2, save_every=100)
    expected = whole(tmp_path / "whole", config, corpus())
    # a validation that is given up would leave no row of step 2
    monkeypatch.setattr(loop, "evaluate", calling(loop.evaluate, 1, send))
    stopped(tmp_path / "run", config)
    assert timeless(read_rows(tmp_path / "run")) == timeless(expected[:2])


def test_a_snapshot_is_finished_before_the_run_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimgrad.runs import snapshot

    config = tiny(steps=6, save_every=2)
    monkeypatch.setattr(snapshot, "save_tensors", calling(snapshot.save_tensors, 3, send))  # the model after step 2
    stopped(tmp_path / "run", config)
    assert [row.step for row in read_rows(tmp_path / "run")] == [1, 2]
    names = {path.name for path in (tmp_path / "run" / "snapshots").iterdir()}
    assert names == {"step-00000000", "step-00000002"}


def test_a_second_signal_stops_a_validation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=6, eval_every=2, save_every=100)

    def twice() -> None:
        send()
        send(signal.SIGTERM)

    monkeypatch.setattr(loop, "evaluate", calling(loop.evaluate, 1, twice))
    assert stopped(tmp_path / "run", config).signal_number == signal.SIGTERM
    assert [row.step for row in read_rows(tmp_path / "run")] == [1]


def test_without_a_folder_a_signal_stops_a_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "add_gradient", calling(loop.add_gradient, 2, send))
    stop, steps = Stop(), []
    with pytest.raises(Interrupted, match="SIGINT"), stop.listening():
        train(tiny(), corpus(), lambda row: steps.append(row.step), stop=stop)
    assert steps == [1]


def test_a_signal_before_a_gradient_stops_it_from_beginning() -> None:
    stop = Stop()
    with stop.listening():
        send()
        with pytest.raises(Interrupted, match="SIGINT"), stop.interruptible():
            pytest.fail("it began")


@pytest.mark.parametrize("error", [None, KeyError])
def test_the_handlers_are_put_back(error: type[Exception] | None) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def listen() -> None:
        with Stop().listening():
            assert all(signal.getsignal(n) is not old for n, old in zip(numbers, before, strict=True))
            if error is not None:
                raise error

    if error is None:
        listen()
    else:
        with pytest.raises(error):
            listen()
    assert [signal.getsignal(number) for number in numbers] == before


def test_outside_the_main_thread_nobody_listens() -> None:
    before, found = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with Stop().listening():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]
