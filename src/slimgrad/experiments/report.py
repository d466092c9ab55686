"""The report: one HTML file that needs nothing beside it, and the rows as CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from slimgrad.experiments.compatibility import EXPERIMENT as COMPATIBILITY
from slimgrad.experiments.compatibility import compare
from slimgrad.experiments.programme import Row
from slimgrad.experiments.tradeoff import compare_costs
from slimgrad.train.files import write_atomically

REPORT = "report.html"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fcfcfd; --line: #d5d5dc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ec; --paper: #17171b; --line: #44444e; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
svg { max-width: 100%; height: auto; } pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; }
.wide { overflow-x: auto; }
"""


def write_report(rows: list[Row], out: Path, command: str) -> Path:
    """Write `report.html`, `rows.json` and a CSV file per experiment into `out`, in the place of earlier ones.

    Args:
        rows: of `programme.run_points`; those that failed are listed with their reason.
        out: the programme's folder.
        command: what made them.
    """
    good = [row for row in rows if "result" in row]
    failed = [row for row in rows if "result" not in row]
    table, costs = compare([row for row in good if row["experiment"] == COMPATIBILITY]), compare_costs(good)
    write_atomically(out / "rows.json", (json.dumps({"command": command, "rows": rows}, indent=1) + "\n").encode())
    for name, entries in ((COMPATIBILITY, table), ("tradeoff", costs)):
        if entries:
            write_atomically(out / f"{name}.csv", _csv(entries).encode())
    machines = sorted({json.dumps(row["machine"], sort_keys=True) for row in good})
    parts = [
        "<h1>The paper, reproduced</h1>",
        "<p><i>Sub-Linear Memory: How to Make Performers SLiM</i> (NeurIPS 2021). Section 4.1: what memory and time "
        "one gradient takes against the chunk. Section 4.3: a model that is trained with plain backpropagation may go "
        "on, or begin, with chunked gradients, and the curves are almost the same; how far they are from plain "
        "backpropagation's stands beside what another seed moves.</p>",
        f"<pre>{html.escape(command)}</pre>",
        *(
            f"<p>Measured on: {html.escape(', '.join(f'{k} {v}' for k, v in json.loads(m).items()))}</p>"
            for m in machines
        ),
        *(_costs_section(name, costs) for name in dict.fromkeys(entry["configuration"] for entry in costs)),
        *(_task_section(task, good, table) for task in dict.fromkeys(entry["task"] for entry in table)),
    ]
    if failed:
        reasons = "".join(f"<li>{html.escape(row['name'])}: {html.escape(row['error'])}</li>" for row in failed)
        parts.append(f"<h2>Points that failed</h2><ul>{reasons}</ul>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>slimgrad: the paper, reproduced</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"{''.join(parts)}</body></html>\n"
    )
    write_atomically(out / REPORT, page.encode())
    return out / REPORT


def _task_section(task: str, rows: list[Row], table: list[Row]) -> str:
    own = [entry for entry in table if entry["task"] == task]
    columns = {
        "regime": "regime", "steps": "steps", "share": "of the published", "final_bits": "validation, bits per byte",
        "final_accuracy": "right", "validation_largest": "validation off plain's, largest",
        "curve_mean": "training curve off plain's, mean", "curve_largest": "largest", "minutes": "minutes",
    }  # fmt: skip
    head = "".join(f"<th>{html.escape(words)}</th>" for words in columns.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(k, entry[k])}</td>' for k in columns)}</tr>" for entry in own)
    return (
        f"<h2>{html.escape(task)}: {own[0]['length']:,} tokens a step</h2>"
        f"{_curves(task, [row for row in rows if row['name'].startswith(task + ' ')])}"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        "<p>seed1 is plain backpropagation with another seed: what chance moves. half: plain for the first half of the "
        "steps, then chunked. The number in a regime is the chunk, C. Curves are compared in groups of steps.</p>"
    )


def _costs_section(name: str, costs: list[Row]) -> str:
    own = [entry for entry in costs if entry["configuration"] == name]
    columns = {
        "form": "form", "method": "method", "chunk": "C", "peak_mb": "peak above parameters and gradients, MB",
        "predicted_mb": "predicted, MB", "measured_over_predicted": "measured / predicted",
        "of_plain_memory": "of plain's memory", "seconds": "seconds", "of_plain_time": "of plain's time",
        "predicted_flops": "predicted, FLOPs of plain's", "time_over_flops": "time / FLOPs", "note": "",
    }  # fmt: skip
    head = "".join(f"<th>{html.escape(words)}</th>" for words in columns.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(k, entry[k])}</td>' for k in columns)}</tr>" for entry in own)
    return (
        f"<h2>Configuration {html.escape(name)}: {own[0]['length']:,} tokens, one gradient</h2>"
        f"{_memory_figure(name, own)}"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        "<p>Each gradient in a process of its own, once. checkpoint: each layer computed twice. The formulas are in "
        "<code>slimgrad.experiments.tradeoff</code>; dotted in the figure.</p>"
    )


def _memory_figure(name: str, own: list[Row]) -> str:
    """Peak memory over the chunk, measured and predicted, with plain backpropagation as a level."""

    def draw(axes: Any) -> None:
        for index, form in enumerate(dict.fromkeys(entry["form"] for entry in own)):
            chunked = [entry for entry in own if entry["form"] == form and entry["method"] == "chunked"]
            chunks, colour = [entry["chunk"] for entry in chunked], f"C{index}"
            axes.plot(chunks, [entry["peak_mb"] for entry in chunked], "o-", color=colour, label=form)
            axes.plot(chunks, [entry["predicted_mb"] for entry in chunked], ":", color=colour)
            for entry in own:
                if entry["form"] == form and entry["method"] == "plain" and not math.isnan(entry["peak_mb"]):
                    axes.axhline(entry["peak_mb"], color=colour, linestyle="--")
        axes.set(xlabel="C, tokens", ylabel="MB (dashed: plain)", xscale="log", yscale="log")

    return _svg(name, draw)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "–"
    if name in ("share", "final_accuracy"):
        return f"{value:.1%}"
    if name in ("curve_mean", "curve_largest", "validation_largest"):
        return f"{value:.1e}" if value else "0"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else html.escape(value)
    )


def _curves(task: str, rows: list[Row]) -> str:
    """Validation over the steps."""

    def draw(axes: Any) -> None:
        for row in rows:
            result = row["result"]
            style = "--" if row["name"].endswith("seed1") else "-"
            axes.plot(result["validation_steps"], result["validation_bits"], style, label=row["name"].split()[1])
        axes.set(xlabel="steps", ylabel="validation, bits per byte")

    return _svg(task, draw)


def _svg(salt: str, draw: Callable[[Any], None]) -> str:
    """A figure as inline SVG, whose ink is the page's own."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axes: Any = figure.subplots()
        draw(axes)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue().decode()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def _csv(table: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]) if table else ["task"])
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
