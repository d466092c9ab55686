"""The joint benchmark: what fails leaves its reason and no time, and what is there is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import figures_joint
from benchmarks.joint import worker
from benchmarks.joint.cases import CHECKPOINT, FLA, OURS, PLAIN, PUBLISHED, Case, Method, joint_cases
from benchmarks.joint.child import Child
from benchmarks.joint.models import Subject, gated_loop
from benchmarks.joint.turns import Row, Settings, Turns, floor, is_done, same
from benchmarks.measure import IN_PLACE_FLOPS
from torch.utils.flop_counter import FlopCounterMode

from slimgrad.errors import RunError

GREEDY, SLOW, WRONG = "greedy", "slow", "wrong"
LENGTH, CHUNK = 64, 16


def toy(method: dict[str, Any], length: int, double: bool) -> Subject:
    """A gated loop; and three faults that are planted."""
    kind = method["kind"]
    subject = gated_loop({**method, "kind": kind if kind in (PLAIN, OURS) else PLAIN}, length, double)

    def gradient(tokens: int, chunk: int) -> None:
        subject.gradient(tokens, chunk)
        if kind == GREEDY and tokens > 1:
            torch.zeros(1 << 30)
        while kind == SLOW and tokens > 1:
            pass
        if kind == WRONG:
            next(subject.model.parameters()).grad[0] += 1

    return subject._replace(gradient=gradient)


def measure(rows: list[Row], *kinds: str) -> list[str]:
    """Measure these, and say which were."""
    methods = tuple(Method(kind=kind, chunk=CHUNK if kind == OURS else 0) for kind in kinds)
    case = Case(name="toy", build="tests.test_joint:toy", length=LENGTH, methods=methods, rounds=2)
    kept: dict[Any, Row] = {}
    Turns(case, list(rows), lambda row: kept.update({same(row): row}), Settings()).measure()
    rows[:] = [row for row in rows if same(row) not in kept] + list(kept.values())
    return [row["method"] for row in kept.values()]


@pytest.mark.slow
def test_what_is_right_is_timed_and_kept_and_what_failed_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: list[Row] = []
    assert measure(rows, PLAIN, OURS, WRONG) == [PLAIN, OURS, WRONG]
    plain, ours, wrong = rows
    assert is_done(plain)
    assert is_done(ours)
    assert ours["error"] < 1e-6
    assert ours["live_bytes"] < plain["live_bytes"]
    for malloc in ("default", "warm"):
        assert ours[malloc]["rounds"] == 2
        assert ours[malloc]["least"] <= ours[malloc]["seconds"] <= ours[malloc]["most"]
        assert {"over_plain", "over_limit"} <= set(ours[malloc])
    assert "a wrong gradient" in wrong["failed"]
    assert "default" not in wrong
    assert json.loads(json.dumps(rows)) == rows
    results = {"rows": rows}
    assert len(figures_joint.joint_table(results).splitlines()) == 2 + len(rows)
    assert len(figures_joint.compact_table(results).splitlines()) == 3
    figures_joint.draw_joint(results, tmp_path / "joint.png")
    monkeypatch.setattr("benchmarks.joint.turns.MALLOCS", ("default",))
    assert measure(rows, PLAIN, OURS) == []
    ours["failed"] = "as it was"
    assert measure(rows, PLAIN, OURS) == [OURS]  # beside plain backpropagation, whose own row stays
    again = next(row for row in rows if row["method"] == OURS)
    assert plain in rows
    assert is_done(again)
    assert "over_plain" in again["default"]


@pytest.mark.parametrize(("kind", "left", "reason"), [(GREEDY, 300, "over 2 GiB"), (SLOW, 1, "over 300 s")])
def test_a_child_keeps_to_its_limits(kind: str, left: int, reason: str) -> None:
    task = {"build": "tests.test_joint:toy", "sizes": {}, "length": LENGTH, "double": False}
    child = Child({**task, "method": vars(Method(kind=kind))}, memory=2 << 30, seconds=300)
    child.ask("truth", path="/dev/null", tokens=1)
    child.left = left
    with pytest.raises(RunError, match=reason):
        child.ask("go")


def test_what_cannot_be_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows: list[Row] = []
    measure(rows, PUBLISHED, FLA)
    assert [row["skipped"] for row in rows] == ["not run: needs --published FOLDER", "not run: its kernels need CUDA"]


def test_products_are_those_that_were_carried_out() -> None:
    a, b = torch.ones(3, 4), torch.ones(5, 4)
    with worker.Products() as found:
        a @ b.T
        a @ b.T
    assert found.found == {(((3, 4), (4, 1)), ((4, 5), (1, 4))): 2}
    asked = worker.Worker({"method": {"kind": "products"}}).multiply([[*key, n] for key, n in found.found.items()])
    assert asked["flops"] == 2 * 2 * 3 * 4 * 5
    assert asked["seconds"] > 0


def test_products_in_place_are_counted() -> None:
    a, b, c = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    with worker.Products() as found, FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS) as flops:
        c.addmm_(a, b)
        c[None].baddbmm_(a[None], b[None])
    assert sum(found.found.values()) == 2
    assert flops.get_total_flops() == 2 * 2 * 3 * 4 * 5


def test_cases_are_apart_and_plain_comes_first() -> None:
    found = [(case.name, case.length, method) for case in joint_cases() for method in case.methods]
    assert len(found) == len(set(found))
    assert all(case.methods[0].kind == PLAIN for case in joint_cases())
    assert floor(1, 8, 8) == 1
    assert floor(3, 8) > floor(3, 8, 4) > 1
    assert CHECKPOINT in {method.kind for _, _, method in found}
