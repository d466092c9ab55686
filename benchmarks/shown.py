"""What pages and pictures share: where they are, the committed results, and where these come from."""

from __future__ import annotations

import json
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


def origin(results: dict[str, Any]) -> str:
    """What the figures were measured on, in a line."""
    machine = results["machine"]
    return (
        f"`{results['command']}`, {machine['cpu']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}, torch {machine['torch']}, Python {machine['python']}. "
        + results.get("note", "")
    ).rstrip()
