"""A measured peak is of the work alone; a child that fails is an error with its own last words."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from slimgrad import RunError
from slimgrad.budget import process
from slimgrad.budget.measure import call_in_child, measure_in_turn, measure_peak
from slimgrad.budget.process import peak_resident_bytes, resident_bytes

ROOT = Path(__file__).parents[2]
MEGABYTES = 64


def peak_of_a_tensor() -> list[int | None]:
    """In a child: after a larger peak, that of one tensor."""
    torch.zeros(4 * MEGABYTES << 18).add_(1)
    return [measure_peak(lambda: torch.zeros(MEGABYTES << 18).add_(1)).peak_bytes]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset before the work on Linux alone")
def test_the_peak_is_of_the_work_alone() -> None:
    (peak,) = call_in_child("tests.budget.test_measure:peak_of_a_tensor", {}, folder=ROOT)
    # measured: 0.05 MB less (the kernel counts in batches of pages); without the reset it would be 192 MB more
    assert abs(peak - (MEGABYTES << 20)) < 1 << 20


def test_a_child_works_where_and_as_it_is_told(tmp_path: Path) -> None:
    assert call_in_child("os:getcwd", {}, folder=tmp_path) == str(tmp_path)
    name = "MALLOC_TRIM_THRESHOLD_"
    assert call_in_child("os:getenv", {"key": name}, environment={name: "7"}) == "7"
    assert name not in os.environ


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RunError, match=r"^ZeroDivisionError: "):
        call_in_child("tests.budget.test_measure:fail", {}, folder=ROOT)
    with pytest.raises(RunError, match=r"^exit status 3$"):
        call_in_child("os:_exit", {"status": 3})


def fail() -> None:
    """In a child."""
    raise ZeroDivisionError("nothing to divide by")


def test_works_take_turns_after_a_round_that_is_not_counted() -> None:
    done: list[str] = []
    seconds = measure_in_turn({name: lambda name=name: done.append(name) for name in "ab"}, rounds=2)
    assert done == ["a", "b"] * 3
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_platforms_that_tell_nothing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "proc_status", lambda _: None)
    monkeypatch.setattr(process, "max_resident_bytes", lambda: None)
    assert resident_bytes() is None
    assert peak_resident_bytes() is None
    assert measure_peak(lambda: None).peak_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to refuse")
def test_a_peak_that_cannot_begin_anew_is_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text((process.PROC / "status").read_text())
    (tmp_path / "clear_refs").mkdir()  # not to be written to, as in some containers
    monkeypatch.setattr(process, "PROC", tmp_path)
    assert peak_resident_bytes() is not None
    assert measure_peak(lambda: None).peak_bytes is None
