"""From committed results to what the README shows: the picture, and the tables between its markers.

python -m benchmarks.figures           # rewrites docs/images/memory.png and the README's tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "images" / "memory.png"
LABELS = {
    "plain": ("plain backpropagation", "#9a9a9a", "o"),
    "checkpoint": ("per-layer checkpointing", "#d98032", "s"),
    "rebuild": ("slimgrad, Rebuild()", "#1f6fb4", "D"),
    "binomial": ("slimgrad, Binomial(8)", "#63a36c", "^"),
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def memory_table(results: dict[str, Any]) -> str:
    """Peak resident memory of one gradient by length and method, in MB; live tensor bytes in brackets."""
    rows = results["rows"]
    lengths = sorted({row["length"] for row in rows})
    lines = [
        "| tokens | " + " | ".join(LABELS[m][0] for m in LABELS) + " |",
        "|---|" + "---|" * len(LABELS),
    ]
    for length in lengths:
        cells = [f"{length:,}"]
        for method in LABELS:
            row = next((r for r in rows if r["method"] == method and r["length"] == length), None)
            cells.append(
                "–" if row is None else f"{row['resident_bytes_default'] / 1e6:.0f} ({row['live_bytes'] / 1e6:.1f})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    ours = sorted((r for r in rows if r["method"] == "rebuild"), key=lambda r: r["length"])
    first, last = ours[0], ours[-1]
    lines += [
        "",
        "What grows with `Rebuild()` is what the allocator leaves between its blocks. With blocks mapped one by one "
        f"(`MALLOC_MMAP_THRESHOLD_=65536`) it takes {first['resident_bytes_mapped'] / 1e6:.1f} MB at "
        f"{first['length']:,} tokens and {last['resident_bytes_mapped'] / 1e6:.1f} MB at {last['length']:,}.",
    ]
    return "\n".join(lines)


def speed_table(results: dict[str, Any]) -> str:
    """Time over plain backpropagation, by configuration and chunk."""
    lines = [
        "| configuration | tokens | chunk | time over plain | with a warm heap | FLOPs over plain | floor |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {(r["model"], r["chunk"], r["malloc"]): r for r in results["rows"]}
    for (model, chunk, malloc), row in rows.items():
        if malloc == "default":
            warm = rows[model, chunk, "warm"]
            lines.append(
                f"| {model} | {row['length']:,} | {chunk:,} | {row['time_ratio']:.2f} | {warm['time_ratio']:.2f} | "
                f"{row['flops_ratio']:.3f} | {row['flops_floor']:.3f} |"
            )
    return "\n".join(lines)


def origin(results: dict[str, Any]) -> str:
    """What the figures were measured on, in a line."""
    machine = results["machine"]
    return (
        f"`{results['command']}`, {machine['cpu']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ''}, torch {machine['torch']}, Python {machine['python']}. "
        + results.get("note", "")
    ).rstrip()


def blocks() -> dict[str, str]:
    """What stands between each pair of markers in the README."""
    found: dict[str, str] = {}
    for name, table in {"memory": memory_table, "speed": speed_table}.items():
        results = load(name)
        found[name] = f"{table(results)}\n\nMeasured by {origin(results)}"
    return found


def fill(text: str) -> str:
    """The README with its tables made anew from the results."""
    for name, block in blocks().items():
        pattern = re.compile(f"(<!-- results: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no '<!-- results: {name} -->' ... '<!-- end -->'")
        text = pattern.sub(lambda match, block=block: match[1] + block + match[2], text)
    return text


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = load("memory")["rows"]
    figure, axes = plt.subplots(figsize=(7.2, 3.8), dpi=150)
    for method, (label, colour, marker) in LABELS.items():
        points = sorted((r["length"], r["resident_bytes_default"] / 1e6) for r in rows if r["method"] == method)
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, linewidth=2, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({r["length"] for r in rows})
    axes.set_xticks(ticks, [f"{t // 1024}K" if t < 1 << 20 else "1M" for t in ticks])
    axes.set_xlabel("tokens in the sequence")
    axes.set_ylabel("peak memory of one gradient (MB)")
    axes.set_title("One gradient, from 4 thousand tokens to a million", loc="left", fontsize=11)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, facecolor="white")


def main() -> None:
    draw()
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
