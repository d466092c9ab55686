"""The loss curve, as a picture in a file and as a sketch in the terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

from slimgrad.bytelm import Row

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bit of each dot: four rows, two columns


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over the last `window` values (over all there are, near the start)."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def sketch(values: Sequence[float], *, width: int = 60, height: int = 8, unicode: bool = True) -> list[str]:
    """Lines of text that show values over their index, highest on top, with the extremes written at the left.

    Args:
        values: at least one.
        width, height: of the drawing in characters, the labels not counted.
        unicode: draw with braille dots, eight to a character; else with asterisks.
    """
    across, down = (2, 4) if unicode else (1, 1)
    columns, rows = width * across, height * down
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    cells = [[0] * width for _ in range(height)]
    previous: int | None = None
    for column in range(columns):
        value = values[round(column * (len(values) - 1) / max(columns - 1, 1))]
        row = round((high - value) / span * (rows - 1))
        first, last = sorted((row, row if previous is None else previous))
        for y in range(first, last + 1):  # joins this column with the one before
            cells[y // down][column // across] |= _DOTS[y % down][column % across] if unicode else 1
        previous = row
    labels = [f"{high:5.2f}", *["     "] * (height - 2), f"{low:5.2f}"]
    draw = ["".join((chr(_BRAILLE | dots) if unicode else "*") if dots else " " for dots in line) for line in cells]
    return [f"{label} {'┤' if unicode else '|'}{line.rstrip()}" for label, line in zip(labels, draw, strict=True)]


def picture(rows: Sequence[Row], title: str) -> bytes:
    """Training and validation loss in bits per byte over the bytes seen, as a PNG."""
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
    axes.set(xlabel="training bytes seen (millions)", ylabel="bits per byte", title=title)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content)
    return content.getvalue()
