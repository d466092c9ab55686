"""A self-contained HTML page: tables, figures as inline SVG in the page's own ink, light and dark."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from slimgrad.paper.programme import Row

# Okabe and Ito's colours that can be told apart on white and on black, also by the colour-blind
COLOURS = ("#0a84c6", "#e08a00", "#009e73", "#c65d9c", "#d55e00", "#7f7f7f")
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5c5c66; --paper: #fcfcfd; --line: #d5d5dc; --link: #0a5ea8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ec; --soft: #a3a3ad; --paper: #17171b; --line: #44444e; --link: #7fb8ee; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 64rem;
       margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; }
a { color: var(--link); }
table { border-collapse: collapse; font-size: 14px; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; }
th:first-child, td:first-child, .words { text-align: left; }
td:first-child { white-space: nowrap; }
svg { max-width: 100%; height: auto; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; font-size: 14px; }
summary { cursor: pointer; color: var(--soft); } .soft { color: var(--soft); font-size: 14px; }
.wide { overflow-x: auto; }
"""

Show = Callable[[Any], str]


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"{body}\n</body></html>\n"
    )


def table(rows: Sequence[Row], columns: Mapping[str, tuple[str, Show]], *, folded: str = "") -> str:
    """A table of the rows.

    Args:
        rows: the entries.
        columns: by key of the entries: the heading, and how a value is shown.
        folded: where not empty, the table is folded away under this heading.
    """
    if not rows:
        return ""
    kind = {key: ' class="words"' if isinstance(rows[0][key], str) else "" for key in columns}
    head = "".join(f"<th{kind[key]}>{html.escape(words)}</th>" for key, (words, _) in columns.items())
    lines = (
        "".join(f"<td{kind[key]}>{html.escape(show(row[key]))}</td>" for key, (_, show) in columns.items())
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    drawn = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return f"<details><summary>{html.escape(folded)}</summary>{drawn}</details>" if folded else drawn


def figure(name: str, *draw: Callable[[Any], None], height: float = 3.6) -> str:
    """One drawing, or several side by side; text is text and takes the page's colour."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        drawing = Figure(figsize=(10 if len(draw) > 1 else 8, height), layout="constrained")
        for index, one in enumerate(draw):
            axes: Any = drawing.add_subplot(1, len(draw), index + 1)
            axes.set_prop_cycle(color=list(COLOURS))
            one(axes)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        drawn = io.BytesIO()
        drawing.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" fill="currentColor" ', 1)


def words(value: Any) -> str:
    """As it is."""
    return str(value)


def whole(value: float) -> str:
    """An integer with its thousands apart."""
    return f"{value:,}"


def fixed(digits: int) -> Show:
    """A number with that many decimals; a dash for NaN."""
    return lambda value: "–" if _missing(value) else f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """A share."""
    return "–" if _missing(value) else f"{value:.1%}"


def power(value: float) -> str:
    """Two digits and a power of ten."""
    return "–" if _missing(value) else f"{value:.1e}" if value else "0"


def _missing(value: float) -> bool:
    return math.isnan(value)
