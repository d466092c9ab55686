"""What each size of chunk would take, beside methods without chunks: in the terminal, and as a picture in a file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from uniplot import plot_to_string

from slimgrad.cli.curve import ASCII_FRAME

SLIMGRAD, BUDGET = "slimgrad", "budget"
PLAIN, CHECKPOINT = "plain backpropagation", "per-layer checkpointing"
CHOSEN, ASKED = "chosen", "--chunk"
_MARKS = {SLIMGRAD: "*", BUDGET: ".", PLAIN: "=", CHECKPOINT: "-", CHOSEN: "O", ASKED: "X"}
_DECADE = 10.0  # from here on, a logarithmic axis
_POWER = re.compile(r"10\^(-?[\d.]+)")


class Point(NamedTuple):
    """What one way to a gradient takes: megabytes that the process holds at most, and seconds."""

    megabytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ways:
    """What there is to draw.

    Attributes:
        chunks: by chunk, from the smallest on, the best way with it.
        marked: by name, single ways: their chunk, and what they take.
        others: by name, methods that have no chunk.
        budget: megabytes.
        title: of the picture.
    """

    chunks: dict[int, Point]
    marked: dict[str, tuple[int, Point]]
    others: dict[str, Point]
    budget: float
    title: str

    @property
    def across(self) -> list[int]:
        """The first chunk and the last."""
        sizes = [*self.chunks, *(chunk for chunk, _ in self.marked.values())]
        return [min(sizes), max(sizes)]


def sketch_ways(ways: Ways, *, width: int = 60, height: int = 10) -> list[str]:
    """Lines of text, in ASCII: memory over the chunk, then seconds, each way with a mark of its own."""
    memory = _sketch(ways, lambda point: point.megabytes, {BUDGET: ways.budget}, width, height)
    seconds = _sketch(ways, lambda point: point.seconds, {}, width, height)
    return ["MB over the chunk", *memory, "", "seconds over the chunk", *seconds]


def _sketch(ways: Ways, of: Callable[[Point], float], levels: dict[str, float], width: int, height: int) -> list[str]:
    levels = {name: of(point) for name, point in ways.others.items()} | levels
    series: list[tuple[str, Sequence[int], Sequence[float]]] = [
        *((name, ways.across, [level, level]) for name, level in levels.items()),
        (SLIMGRAD, list(ways.chunks), [of(point) for point in ways.chunks.values()]),
        *((name, [chunk], [of(point)]) for name, (chunk, point) in ways.marked.items()),
    ]
    values = [value for _, _, found in series for value in found]
    drawn = plot_to_string(
        [found for _, _, found in series], [chunks for _, chunks, _ in series], lines=True,
        legend_labels=[name for name, _, _ in series], width=width, height=height, color=False, x_gridlines=[],
        y_gridlines=[], x_as_log=True, y_as_log=max(values) > _DECADE * min(values), character_set="ascii",
        force_ascii_characters=[_MARKS[name] for name, _, _ in series],
    )  # fmt: skip
    plain = _POWER.sub(_number, drawn)
    return [line.translate(ASCII_FRAME).rstrip() for line in plain.splitlines()]


def _number(power: re.Match[str]) -> str:
    value = 10.0 ** float(power[1])
    return f"{value:.0f}" if value > _DECADE else f"{value:.2g}"


def picture_ways(ways: Ways) -> bytes:
    """Memory and time over the chunk, one above the other, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, index, unit in ((upper, 0, "resident memory, MB"), (lower, 1, "seconds for one gradient")):
        points = [point[index] for point in ways.chunks.values()]
        axes.plot(list(ways.chunks), points, color="#08519c", linewidth=1.8, label=SLIMGRAD)
        for color, (name, point) in zip(("#d94801", "#756bb1"), ways.others.items(), strict=False):
            axes.axhline(point[index], color=color, linestyle="--", linewidth=1.2, label=f"{name}, extrapolated")
        for color, (name, (chunk, point)) in zip(("#cb181d", "#31a354"), ways.marked.items(), strict=False):
            axes.plot([chunk], [point[index]], "*", color=color, markersize=14, label=name)
        axes.set(xscale="log", yscale="log", ylabel=unit)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    upper.axhline(ways.budget, color="black", linestyle=":", linewidth=1.2, label=BUDGET)
    upper.set(title=ways.title)
    lower.set(xlabel="chunk, tokens")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    content = io.BytesIO()
    figure.savefig(content)
    return content.getvalue()
