"""What docs/reproduce.md shows: the published code beside ours."""

from __future__ import annotations

from typing import Any

from benchmarks.shown import load, origin


def published_table(results: dict[str, Any]) -> str:
    """Gradient, time and memory of both, by configuration, chunk and form of the published code."""
    lines = [
        "| configuration | tokens | chunk | published form | seconds, published | slimgrad | times as fast | "
        "MB, published | slimgrad | gradient off float64's, published | slimgrad |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = results["rows"]
    for row in rows:
        times = f"{row['times_as_fast']:.1f} ({row['times_as_fast_min']:.1f} to {row['times_as_fast_max']:.1f})"
        lines.append(
            f"| {row['model']} | {row['length']:,} | {row['chunk']} | {row['form']} | {row['published_seconds']:.2f} | "
            f"{row['seconds']:.2f} | {times} | {row['published_peak_bytes'] / 1e6:,.0f} | "
            f"{row['peak_bytes'] / 1e6:,.0f} | {row['published_error']:.1e} | {row['error']:.1e} |"
        )
    rounds = [row["rounds"] for row in rows]
    lines += [
        "",
        f"Medians of {min(rounds)} to {max(rounds)} rounds, and the least and largest ratio of a round. In float64, no "
        f"parameter's gradient of two chunks and a token is farther from plain backpropagation's than "
        f"{max(row['float64_apart_worst'] for row in rows):.0e}.",
    ]
    return "\n".join(lines)


def published_blocks() -> dict[str, str]:
    """What stands between the markers of docs/reproduce.md."""
    results = load("published")
    return {"published": f"{published_table(results)}\n\nMeasured by {origin(results)}"}
