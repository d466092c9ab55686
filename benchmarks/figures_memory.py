"""README's picture, once for a light page and once for a dark one."""

from __future__ import annotations

from typing import Any

from benchmarks.shown import IMAGES, LABELS, load, save_for_pages

MEGABYTES = {50: "50 MB", 100: "100 MB", 200: "200 MB", 500: "500 MB", 1000: "1 GB"}


def draw_memory() -> None:
    """Peak resident memory of one gradient over the length of the sequence."""
    rows = load("memory")["rows"]
    save_for_pages(lambda plt: _draw(plt, rows), IMAGES / "memory.png")


def _draw(plt: Any, rows: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for method, (label, colour, marker) in LABELS.items():
        points = sorted((r["length"], r["resident_bytes_default"] / 1e6) for r in rows if r["method"] == method)
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, linewidth=2, markersize=5)
        if method == "plain":
            axes.annotate(
                "not run beyond: memory is linear in the length", points[-1],
                xytext=(8, -4), textcoords="offset points", fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({r["length"] for r in rows})
    axes.set_xticks(ticks, [f"{t // 1024}K" if t < 1 << 20 else "1M" for t in ticks])
    axes.set_yticks(list(MEGABYTES), list(MEGABYTES.values()))
    axes.minorticks_off()
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("peak memory of one gradient")
    axes.set_title("One gradient, from 4 thousand tokens to a million", loc="left", fontsize=11)
    axes.grid(alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    figure.tight_layout()
    return figure
