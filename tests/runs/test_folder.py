"""A run of one's own kind: other rows, another model, another optimiser, on the same folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimgrad import InputError
from slimgrad.runs.folder import RunFolder
from slimgrad.runs.snapshot import restore

STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    step: int
    loss: float


class Regression(RunFolder[Row]):
    """Runs whose record says how wide the model is."""

    row = Row

    @staticmethod
    def check(record: dict[str, Any]) -> int:
        return int(record["width"])


def work(run: Regression, until: int) -> nn.Module:
    """Steps up to a number, each with a snapshot but the odd ones."""
    torch.manual_seed(0)
    model = nn.Linear(run.check(run.record), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    done = 0
    if run.snapshot is not None:
        restore(run.snapshot, model, optimizer)
        done = run.snapshot.step
        assert run.snapshot.noted == {"seen": 3 * done}
    for step in range(done + 1, until + 1):
        loss = model(torch.full((3, model.in_features), float(step))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.add(Row(step=step, loss=float(loss.detach())))
        if step % 2 == 0:
            run.save_snapshot(step=step, model=model, optimizer=optimizer, noted={"seen": 3 * step})
    return model


def test_a_run_that_was_stopped_goes_on_as_an_undisturbed_one(tmp_path: Path) -> None:
    with Regression.create_in(tmp_path / "whole", "line", {"width": 4}) as run:
        expected, rows = work(run, STEPS), run.rows()
    with Regression.create_in(tmp_path / "stopped", "line", {"width": 4}) as run:
        work(run, 3)  # one step beyond its last snapshot
    with Regression.reopen(tmp_path / "stopped") as run:
        assert [row.step for row in run.rows()] == [1, 2]
        found = work(run, STEPS)
        assert run.rows() == rows
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    with Regression.create_in(tmp_path / "run", "line", {"height": 4}):
        pass
    with pytest.raises(InputError, match=r"config\.json: expected the record of a run, it cannot be read: 'width'"):
        Regression.reopen(tmp_path / "run")


def test_what_is_written_first_is_there_before_the_record(tmp_path: Path) -> None:
    def fail(run: Regression) -> None:
        assert list(run.path.glob("config.json")) == []
        raise KeyError

    with pytest.raises(KeyError):
        Regression.create_in(tmp_path / "run", "line", {"width": 4}, fail)
    with Regression.create_in(tmp_path / "run", "line", {"width": 4}) as run:  # unlocked, and still no run
        assert run.snapshot is None
