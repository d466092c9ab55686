"""What pages and pictures share: where they are, the committed results, and where these come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
LABELS = {
    "plain": ("plain backpropagation", "#9a9a9a", "o"),
    "checkpoint": ("per-layer checkpointing", "#d98032", "s"),
    "rebuild": ("slimgrad, Rebuild()", "#1f6fb4", "D"),
    "binomial": ("slimgrad, Binomial(8)", "#63a36c", "^"),
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def save_for_pages(draw: Callable[[Any], Any], path: Path) -> None:
    """Save the figure that `draw(pyplot)` makes for a light page, and as NAME-dark beside it for a dark one."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    dark = path.with_stem(path.stem + "-dark")
    for to, background, text in ((path, "white", "black"), (dark, "#0d1117", "#e6edf3")):
        ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text)
        with plt.rc_context(ink | {"axes.facecolor": background}):
            figure = draw(plt)
            figure.savefig(to, facecolor=background)
            plt.close(figure)


def picture(path: str, words: str) -> str:
    """The two of `save_for_pages` on a page, which shows the one that suits its reader."""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{path.removesuffix(".png")}-dark.png">\n'
        f'  <img alt="{words}" src="{path}">\n</picture>'
    )


def origin(results: dict[str, Any]) -> str:
    """What the figures were measured on, in a line."""
    machine = results["machine"]
    return (
        f"`{results['command']}`, {machine['cpu']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}, torch {machine['torch']}, Python {machine['python']}. "
        + results.get("note", "")
    ).rstrip()
