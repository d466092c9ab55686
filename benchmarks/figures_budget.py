"""What docs/budget.md shows: plans against what happened, and one gradient over a whole text."""

from __future__ import annotations

from typing import Any

from benchmarks.shown import IMAGES, LABELS, load, origin

OURS = "#1f6fb4"


def budget_table(results: dict[str, Any]) -> str:
    """Predicted against measured: the whole process' peak, the bytes of tensors, and seconds, by model and budget."""
    lines = [
        "| model | tokens | malloc | budget, MB | chunk, schedule | peak, MB | of prediction | live bytes, of account "
        "| seconds | predicted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "failed" in row or row["method"] != "ours":
            continue
        plan = row["plan"]
        malloc = f"command: {plan['malloc']}" if row["malloc"] == "command" else row["malloc"]
        lines.append(
            f"| {row['model']} | {row['length']:,} | {malloc} | {plan['memory'] / 1e6:,.0f} | "
            f"{plan['chunk']:,}, {plan['schedule']} | {row['peak_bytes'] / 1e6:,.0f} | "
            f"{row['peak_bytes'] / row['predicted_bytes']:.2f} | "
            f"{row['live_bytes'] / row['predicted_live_bytes']:.2f} | {row['seconds']:.1f} | "
            f"{row['predicted_seconds']:.1f} |"
        )
    return "\n".join(lines)


def whole_text_sentence(results: dict[str, Any]) -> str:
    """The gradient over the whole text, where it was measured."""
    row = next((row for row in results["rows"] if row["what"] == "run"), None)
    if row is None:
        return ""
    resident = max(point["resident_bytes"] for point in row["trace"])
    return (
        f"\n\nAnd one exact gradient over a text of {row['bytes']:,} bytes as *one* sequence (two layers, width 128): "
        f"{row['step_seconds'] / 60:,.0f} minutes on {row['threads']} CPU threads, "
        f"{resident / 1e6:,.0f} MB resident, within the {row['memory']} that were stated."
    )


def whole_text_table(results: dict[str, Any]) -> str:
    """One gradient over a whole text, the same over less checked against an oracle, and killed on its way."""
    lines = ["| what | bytes | threads | |", "|---|---|---|---|"]
    for row in sorted(results["rows"], key=lambda row: (row["what"] != "run", row["what"], row["bytes"])):
        if row["what"] == "run":
            plan, resident = row["plan"], max(point["resident_bytes"] for point in row["trace"])
            predicted = f"{sum(plan['account'].values()) / 1e6:,.0f} MB, {plan['seconds']:,.0f} s"
            words = (
                f"{row['step_seconds']:,.0f} s, {row['bytes_per_second']:,.0f} bytes/s in chunks of {plan['chunk']:,}, "
                f"malloc {plan['malloc']}; at most {resident / 1e6:,.0f} MB resident between two chunks, "
                f"within {row['memory']} (predicted at the peak: {predicted})"
            )
        elif row["what"] == "check":
            plain = f", of plain float32 backpropagation {row['error_plain']:.1e}" if "error_plain" in row else ""
            words = (
                f"error against Algorithm 1 in float64 {row['error']:.1e}; of Algorithm 1 in float32 "
                f"{row['error_float32']:.1e}{plain}"
            )
        else:
            times = ", ".join(f"{kill['after_seconds']:.0f}" for kill in row["kills"])
            words = (
                f"killed after {times} s of three sessions (saved: "
                f"{', '.join('yes' if kill['saved'] else 'no' for kill in row['kills'])}) and resumed: "
                + ("the same bits" if row["same_bits"] else "other bits")
            )  # fmt: skip
        lines.append(f"| {row['what']} | {row['bytes']:,} | {row.get('threads', '')} | {words} |")
    return "\n".join(lines)


def budget_blocks() -> dict[str, str]:
    """Those of the guide to budgets."""
    budget, text = load("budget"), load("whole_text")
    return {
        "budget": f"{budget_table(budget)}\n\nMeasured by {origin(budget)}",
        "whole text": f"{whole_text_table(text)}\n\nMeasured by {origin(text)}",
    }


def draw_budget(plt: Any) -> None:
    """Time over memory of each preset: ours at one to eight times the least, beside plain and checkpointing."""
    rows = [row for row in load("budget")["rows"] if "failed" not in row]
    presets = [name for name in ("I", "II", "III", "IV") if any(row["model"] == name for row in rows)]
    figure, panels = plt.subplots(1, len(presets), figsize=(3 * len(presets), 3.4), dpi=150, squeeze=False)
    for name, axes in zip(presets, panels[0], strict=True):
        own = [row for row in rows if row["model"] == name]
        length = min(row["length"] for row in own)

        def points(method: str, malloc: str, own: Any = own, length: int = length) -> list[tuple[float, float]]:
            chosen = [row for row in own if (row["method"], row["malloc"], row["length"]) == (method, malloc, length)]
            return sorted(((row["peak_bytes"] - row["before_bytes"]) / 1e6, row["seconds"]) for row in chosen)

        axes.plot(*zip(*points("ours", "command"), strict=True), "o-", color=OURS, label="slimgrad, commands")
        axes.plot(*zip(*points("ours", "default"), strict=True), "o:", color=OURS, label="slimgrad, default malloc")
        for method in ("plain", "checkpoint"):
            label, colour, marker = LABELS[method]
            for x, y in points(method, "default"):
                axes.plot([x], [y], marker, color=colour, markersize=8, label=label)
        axes.set_title(f"{name}, {length:,} tokens", loc="left", fontsize=11)
        axes.set(xscale="log", xlabel="peak memory of one gradient (MB)")
        axes.set_ylim(bottom=0)
        least, most = axes.get_xlim()
        ticks = [tick for tick in (50, 100, 200, 500, 1000, 2000) if least <= tick <= most]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _plain(axes)
    panels[0][0].set_ylabel("seconds")
    panels[0][-1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / "budget.png", facecolor="white")


def draw_whole_text(plt: Any) -> None:
    """Memory over time, and the adjoint's norm over the position, of one gradient over a whole text."""
    row = next((row for row in load("whole_text")["rows"] if row["what"] == "run"), None)
    if row is None:
        return
    trace = row["trace"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=150)
    minutes = [point["seconds"] / 60 for point in trace]
    left.plot(minutes, [point["resident_bytes"] / 1e6 for point in trace], color=OURS, label="resident, between chunks")
    left.plot(minutes, [point["held_bytes"] / 1e6 for point in trace], color="#63a36c", label="states and adjoints")
    left.axhline(row["plan"]["memory"] / 1e6, color="#9a9a9a", linestyle="--", label="the budget")
    left.axvline(next(m for m, p in zip(minutes, trace, strict=True) if p["phase"] == "reverse"), color="#d9d9d9")
    left.set(xlabel="minutes", ylabel="MB", yscale="log")
    left.legend(frameon=False, fontsize=8)
    back = [point for point in trace if point["phase"] == "reverse" and point["adjoint_norm"]]
    right.plot(
        [point["position"] / 1e6 for point in back],
        [point["adjoint_norm"] for point in back],
        color=OURS,
        linewidth=0.8,
    )
    right.set(xlabel="position in the text (million bytes)", ylabel="norm of the state's gradient", yscale="log")
    for axes in (left, right):
        _plain(axes)
    figure.suptitle(f"One gradient over {row['bytes']:,} bytes", x=0.02, ha="left", fontsize=11)
    figure.tight_layout()
    figure.savefig(IMAGES / "whole_text.png", facecolor="white")


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.3, linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
