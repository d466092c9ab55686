"""The report: one HTML file that needs nothing beside it, and the rows as CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable
from pathlib import Path

from slimgrad.paper import sections
from slimgrad.paper.compatibility import EXPERIMENT as COMPATIBILITY
from slimgrad.paper.compatibility import compare
from slimgrad.paper.finetuning import EXPERIMENT as FINETUNING
from slimgrad.paper.finetuning import compare_finetuning
from slimgrad.paper.horizon import EXPERIMENT as HORIZON
from slimgrad.paper.horizon import compare_horizons
from slimgrad.paper.lengths import LENGTHS, SCHEDULES, compare_lengths, compare_schedules
from slimgrad.paper.page import page
from slimgrad.paper.precision import EXPERIMENT as PRECISION
from slimgrad.paper.precision import compare_drift, compare_precision
from slimgrad.paper.programme import Row
from slimgrad.paper.tradeoff import EXPERIMENT as TRADEOFF
from slimgrad.paper.tradeoff import compare_costs, compare_times
from slimgrad.runs.files import write_atomically

REPORT = "report.html"
TABLES: dict[str, Callable[[list[Row]], list[Row]]] = {
    f"{TRADEOFF}-memory": compare_costs,
    f"{TRADEOFF}-time": compare_times,
    PRECISION: compare_precision,
    f"{PRECISION}-drift": compare_drift,
    COMPATIBILITY: lambda rows: compare([row for row in rows if row["experiment"] == COMPATIBILITY]),
    FINETUNING: compare_finetuning,
    HORIZON: compare_horizons,
    LENGTHS: compare_lengths,
    SCHEDULES: compare_schedules,
}


def write_report(rows: list[Row], out: Path, command: str, *, total: int) -> Path:
    """Write `report.html`, `rows.json` and a CSV file per table into `out`, in the place of earlier ones.

    Args:
        rows: of `programme.run_points`; those that failed are listed with their reason.
        out: the programme's folder.
        command: what made them.
        total: points of the programme, done or not.
    """
    good = [row for row in rows if "result" in row]
    failed = [row for row in rows if "result" not in row]
    tables = {name: make(good) for name, make in TABLES.items()}
    write_atomically(
        out / "rows.json", (json.dumps({"command": command, "points": total, "rows": rows}, indent=1) + "\n").encode()
    )
    for name, entries in tables.items():
        if entries:
            write_atomically(out / f"{name}.csv", _csv(entries).encode())
    chapters = [
        ("a", TRADEOFF, "Trade-off: memory and time against the chunk", sections.tradeoff(
            tables[f"{TRADEOFF}-memory"], tables[f"{TRADEOFF}-time"])),
        ("b", PRECISION, "Precision", sections.precision(tables[PRECISION], tables[f"{PRECISION}-drift"], good)),
        ("c", COMPATIBILITY, "Backward compatibility", sections.compatibility(tables[COMPATIBILITY], good)),
        ("d", FINETUNING, "Fine-tuning on a small device", sections.finetuning(tables[FINETUNING])),
        ("e1", HORIZON, "Beyond the paper: exact against truncated gradients", sections.horizon(tables[HORIZON], good)),
        ("e2", LENGTHS, "Beyond the paper: memory against length", sections.lengths(tables[LENGTHS])),
        ("e3", SCHEDULES, "Beyond the paper: what a schedule costs", sections.schedules(tables[SCHEDULES])),
    ]  # fmt: skip
    shown = [chapter for chapter in chapters if chapter[3]]
    parts = [_opening(rows, command, total), "<ul>"]
    parts += [f'<li><a href="#{key}">({key}) {html.escape(title)}</a></li>' for key, _, title, _ in shown]
    parts.append("</ul>")
    for key, experiment, title, text in shown:
        points = sections.configuration([row for row in good if row["experiment"] == experiment])
        parts.append(f'<h2 id="{key}">({key}) {html.escape(title)}</h2>{text}{points}')
    if failed:
        reasons = "".join(f"<li>{html.escape(row['name'])}: {html.escape(row['error'])}</li>" for row in failed)
        parts.append(f"<h2>Points that failed</h2><ul>{reasons}</ul>")
    parts.append(_machines(good))
    write_atomically(out / REPORT, page("slimgrad: the paper, reproduced", parts).encode())
    return out / REPORT


def _opening(rows: list[Row], command: str, total: int) -> str:
    return (
        "<h1>The paper, reproduced</h1>"
        "<p><i>Sub-Linear Memory: How to Make Performers SLiM</i> (NeurIPS 2021): its four experiments, measured anew "
        "with slimgrad, and what the paper did not have. Every figure comes from the rows beside this page "
        f"(<code>rows.json</code>, and a CSV file per table); {len(rows):,} of {total:,} points. Each was measured in "
        "a process of its own; what else the machine did meanwhile shows in seconds, not in bytes.</p>"
        f"<pre>{html.escape(command)}</pre>"
    )


def _machines(rows: list[Row]) -> str:
    """What was measured on what: one line per machine, with the experiments that it did."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["machine"], sort_keys=True), set()).add(row["experiment"])
    lines = (
        f"<li>{', '.join(sorted(experiments))}: "
        f"{html.escape(', '.join(f'{k} {v}' for k, v in json.loads(machine).items()))}</li>"
        for machine, experiments in found.items()
    )
    return f"<h2>Measured on</h2><ul>{''.join(lines)}</ul>"


def _csv(table: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
