"""The loss curve, as a picture in a file and as a sketch in the terminal."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from uniplot import plot_to_string

from slimgrad.bytelm import Row

ASCII_FRAME = str.maketrans("┌┐└┘─│", "++++-|")  # which uniplot has in Unicode only


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over the last `window` values (over all there are, near the start)."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def sketch(values: Sequence[float], *, width: int = 60, height: int = 8, unicode: bool = True) -> list[str]:
    """Lines of text that show values over the steps.

    Args:
        values: at least one, a step each.
        width, height: of the drawing in characters, the frame and the labels not counted.
        unicode: draw with braille dots, eight to a character; else in ASCII.
    """
    drawn = plot_to_string(
        list(values), range(1, len(values) + 1), lines=True, width=width, height=height, color=False, x_gridlines=[],
        y_gridlines=[], character_set="braille" if unicode else "ascii",
    )  # fmt: skip
    return [line.rstrip() for line in (drawn if unicode else drawn.translate(ASCII_FRAME)).splitlines()]


def picture(rows: Sequence[Row], title: str) -> bytes:
    """Training and validation loss in bits per byte over the bytes seen, as a PNG."""
    os.environ.pop("MPLBACKEND", None)  # one that is not installed here would be asked for, and is not used
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen = [row.bytes_seen / 1e6 for row in rows]
    bits = [row.bits for row in rows]
    validated = [(row.bytes_seen / 1e6, row.validation_bits) for row in rows if row.validation_bits is not None]
    axes.plot(seen, bits, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(seen, smooth(bits, max(1, len(bits) // 40)), color="#08519c", linewidth=1.8, label="training, smoothed")
    axes.plot(*zip(*validated, strict=True), color="#d94801", marker="o", linewidth=1.2, label="validation")
    axes.annotate(
        f"{validated[-1][1]:.2f}", validated[-1],
        textcoords="offset points", xytext=(0, 8), ha="right", color="#d94801",
    )  # fmt: skip
    axes.set(xlabel="training bytes seen (millions)", ylabel="bits per byte")
    axes.set_title(title.encode(errors="replace").decode(), parse_math=False)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content)
    return content.getvalue()
