"""The committed table of types is what the documentation shows, and nothing in it is left open."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import hf_table
from benchmarks.measure import RESULTS


def test_the_page_is_made_from_the_committed_results() -> None:
    rows = json.loads((RESULTS / "hf_table.json").read_text())["rows"]
    page = hf_table.DOCUMENT.read_text()
    versions = next(line for line in page.splitlines() if line.startswith("Transformers ")).split(". Of ")[0]
    assert hf_table.document(rows, versions) == page, "run: python -m benchmarks.hf_table"
    types = [row for row in rows if not row.get("published")]
    exact = [row for row in types if row["result"] == "exact"]
    assert len(exact) >= 160
    assert all(row["error"] <= 1e-10 for row in exact)
    assert all(row["reason"] for row in types if row["result"] != "exact")
    assert all(row["result"] == "exact" for row in rows if row.get("published"))


def test_a_child_out_of_time_or_killed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def certified(name: str) -> dict[str, str]:
        while name == "slow":
            pass
        if name == "large":
            bytearray(1 << 40)
        return {"type": name, "result": "exact"}

    monkeypatch.setattr(hf_table, "certified", certified)
    monkeypatch.setattr(hf_table, "SECONDS", 1)
    found = {row["type"]: row["result"] for row in hf_table.certified_all(["slow", "quick", "large"], 2)}
    assert found == {"slow": "timed out", "quick": "exact", "large": "not built"}
