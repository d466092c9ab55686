"""What the README says was measured, was measured: its tables are those of the committed results."""

from __future__ import annotations

import json

import pytest
from benchmarks import figures
from benchmarks.measure import RESULTS


@pytest.mark.parametrize("page", figures.PAGES)
def test_the_tables_of_a_page_are_made_from_the_committed_results(page: str) -> None:
    text = (figures.ROOT / page).read_text(encoding="utf-8")
    assert figures.filled(page) == text, "run: python -m benchmarks.figures"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path: object) -> None:
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m benchmarks")
    assert {"cpu", "threads", "torch", "python", "slimgrad"} <= set(results["machine"])
    assert results["rows"]
