"""What README and docs/results.md show of the joint benchmark: one table, a short one, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.joint.cases import CHECKPOINT, OURS, PERFORMER_PYTORCH, PLAIN, PUBLISHED
from benchmarks.shown import IMAGES, LABELS, load, origin, picture, save_for_pages

Row = dict[str, Any]
NAMES = {PLAIN: LABELS["plain"][0], CHECKPOINT: LABELS["checkpoint"][0]}
STYLES = {PLAIN: LABELS["plain"][1:], CHECKPOINT: LABELS["checkpoint"][1:], OURS: LABELS["rebuild"][1:]}
OTHERS = ("#63a36c", "^")
PICTURE = "Time and memory of one gradient, case by case"


def name_of(row: Row) -> str:
    """The method, for people."""
    parts = [NAMES.get(row["method"], row["method"])]
    parts += [f"C = {row['chunk']:,}"] if row["chunk"] else []
    parts += [f"a tape of {row['tape']}"] if row.get("tape") else []
    parts += [f'"{row["form"]}"'] if row.get("form") else []
    return ", ".join(parts)


def with_published(results: Row) -> list[Row]:
    """The rows, and in the place of those of the published code that were not run, what `benchmarks.published` found.

    Its seconds were not measured in turns with these, so they have no ratios to them.
    """
    committed = {(row["model"], row["chunk"], row["form"]): row for row in load("published")["rows"]}
    rows: list[Row] = []
    for row in results["rows"]:
        found = committed.get((row["case"], row["chunk"], row.get("form", "")))
        if row["method"] == PUBLISHED and "skipped" in row and found is not None and found["length"] == row["tokens"]:
            row = {name: value for name, value in row.items() if name != "skipped"}
            row |= {"resident_bytes": found["published_peak_bytes"], "error": found["published_error"]}
            row |= {"default": {"seconds": found["published_seconds"]}, "over_ours": found["times_as_fast"]}
        rows.append(row)
    return rows


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one case."""
    keys = dict.fromkeys((row["case"], row["tokens"]) for row in rows)
    return [[row for row in rows if (row["case"], row["tokens"]) == key] for key in keys]


def joint_table(results: Row) -> str:
    """Every row: memory, time, both over plain backpropagation's, over the limit, and the error."""
    lines = [
        "| model | tokens | gradient | memory, MB | seconds | warm heap | over plain | warm | times the limit | warm | "
        "FLOPs over plain (floor) | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in with_published(results):
        start = f"| {row['case']} | {row['tokens']:,} | {name_of(row)} |"
        reason = row.get("failed", row.get("skipped"))
        lines.append(start + (f" {reason} |" + " |" * 8 if reason else cells(row)))
    return "\n".join(lines)


def cells(row: Row) -> str:
    """The figures of a row that has them."""
    memory = f"{row['resident_bytes'] / 1e6:,.0f}"
    memory += f" ({row['live_bytes'] / 1e6:,.0f})" if "live_bytes" in row else ""
    found = [memory, seconds(row, "default"), seconds(row, "warm")]
    found += [ratio(row, malloc, f"over_{name}") for name in ("plain", "limit") for malloc in ("default", "warm")]
    if "over_ours" in row:
        found[3] = f"{row['over_ours']:.1f} of ours"
    flops = f"{row['flops_over_plain']:.3f}" if "flops_over_plain" in row else ""
    flops += f" ({row['flops_floor']:.3f})" if "flops_floor" in row else ""
    return f" {' | '.join(found)} | {flops} | {row['error']:.0e} |"


def seconds(row: Row, malloc: str) -> str:
    """The median, and from least to most."""
    taken = row.get(malloc)
    if taken is None:
        return ""
    words = f"{taken['seconds']:.3g}"
    return words + (f" ({taken['least']:.3g} to {taken['most']:.3g})" if "least" in taken else "")


def ratio(row: Row, malloc: str, name: str) -> str:
    found = row.get(malloc, {}).get(name)
    return "" if found is None else f"{found:.2f}"


def compact_table(results: Row, cases: Sequence[tuple[str, int]] | None = None) -> str:
    """One line a case: plain, per-layer checkpointing, ours in its largest chunks and in its smallest, peers."""
    lines = [
        "| model, tokens | plain backpropagation | per-layer checkpointing | slimgrad | time over plain (warm heap) |",
        "|---|---|---|---|---|",
    ]
    for rows in groups(results["rows"]):
        found = {method: next((row for row in rows if row["method"] == method), {}) for method in (PLAIN, CHECKPOINT)}
        ours = [row for row in rows if row["method"] == OURS and "warm" in row and not row.get("tape")]
        if not ours or (cases is not None and (rows[0]["case"], rows[0]["tokens"]) not in cases):
            continue
        pair = ours[:1] + ours[1:][-1:]
        own = [f"C = {row['chunk']:,}: {short(row)}" for row in pair]
        times = [f"{ratio(row, 'default', 'over_plain')} ({ratio(row, 'warm', 'over_plain')})" for row in pair]
        times = [words for words in times if words != " ()"]
        lines.append(
            f"| {rows[0]['case']}, {rows[0]['tokens']:,} | {short(found[PLAIN])} | {short(found[CHECKPOINT])} | "
            f"{'; '.join(own)} | {'; '.join(times)} |"
        )
    return "\n".join(lines)


README = [
    ("I", 8192), ("II", 1024), ("III", 4096), ("2 layers, d 128", 32_768), ("1 layer, d 128", 1_048_576),
    ("nn.GRU, 2 layers, d 128", 8192), ("mambapy, 2 layers, d 64", 4096), ("Llama, 4 layers, d 256", 2048),
]  # fmt: skip


def readme_block(results: Row) -> str:
    """The short table, the picture, and what other code takes for the same."""
    mambapy = any(row["case"].startswith("mambapy") for row in results["rows"])
    return "\n\n".join(
        [
            "slimgrad in the largest and the smallest chunks that were measured; processor seconds of one thread. I, "
            "II and III are the paper's"
            + ("; of mambapy, plain backpropagation is its own parallel scan." if mambapy else "."),
            compact_table(results, README),
            others_sentence(results),
            picture("docs/images/joint.png", PICTURE),
            f"Measured by {origin(results)}",
        ]
    )


def others_sentence(results: Row) -> str:
    """The published code and performer-pytorch beside ours."""
    rows, words = with_published(results), list[str]()
    for row in rows:
        ours = next((r for r in rows if [r[n] for n in KEY] == [row[n] for n in KEY[:2]] + [OURS, row["chunk"]]), None)
        if row["method"] == PUBLISHED and "default" in row and row.get("form") == "iter" and ours is not None:
            times = row.get("over_ours") or row["default"]["seconds"] / ours["default"]["seconds"]
            words.append(f"{times:.1f} times as long ({row['case']}, C = {row['chunk']})")
    found = [f"For the same gradient the paper's published code takes {', '.join(words)}."] if words else []
    others = [row for row in rows if row["method"] == PERFORMER_PYTORCH]
    told = [f"{row['case']} ({row['tokens']:,} tokens): {short(row)}" for row in others]
    found += [f"`performer-pytorch`, a like model of the same shape: {'; '.join(told)}."] if told else []
    return " ".join(found)


KEY = ("case", "tokens", "method", "chunk")


def short(row: Row) -> str:
    """Memory and time of a row, or why there are none."""
    if not row:
        return ""
    if "failed" in row or "skipped" in row:
        return str(row.get("failed", row.get("skipped"))).split(",")[0]
    taken = row["default"]["seconds"]
    return f"{row['resident_bytes'] / 1e6:,.0f} MB, {taken:.{1 if taken >= 1 else 2}f} s"


def joint_sentence(results: Row) -> str:
    """What stands below the whole table."""
    failed = any("failed" in row for row in results["rows"])
    words = (
        "Memory: resident above what the process held before, gradients of the parameters included; in brackets the "
        "bytes of tensors alive, counted. Processor seconds: medians of rounds in which the methods of a case take "
        "turns, and the least and the most; ratios are medians of the rounds' own. The limit: FLOPs of plain "
        "backpropagation at the rate of its own matrix products. "
    )
    if any("over_ours" in row for row in with_published(results)):
        words += "The published code's rows were measured by `python -m benchmarks.published FOLDER`, beside ours. "
    if any(row["method"] == PERFORMER_PYTORCH for row in results["rows"]):
        words += "performer-pytorch's model has the same shape and is another one: its error is against itself. "
    return words + ("Where a row has words in the place of figures, they say why." if failed else "")


def joint_block(results: Row) -> str:
    """The whole table with its words."""
    drawn = picture("images/joint.png", PICTURE)
    return f"{drawn}\n\n{joint_table(results)}\n\n{joint_sentence(results).strip()}\n\nMeasured by {origin(results)}"


def draw_joint(results: Row, path: Path = IMAGES / "joint.png") -> None:
    """Time over memory, a panel for each case: ours from large chunks to small ones, beside the others."""
    save_for_pages(lambda plt: _draw(plt, results), path)


def _draw(plt: Any, results: Row) -> Any:
    shown = [[row for row in rows if "default" in row and "failed" not in row] for rows in groups(results["rows"])]
    shown = [rows for rows in shown if any(row["method"] == OURS for row in rows)]
    columns = min(len(shown), 5)
    lines = -(-len(shown) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(2.7 * columns, 2.3 * lines + 0.6), dpi=150, squeeze=False)
    labels: dict[str, Any] = {}
    for axes, rows in zip(panels.flat, shown, strict=False):
        ours = [row for row in rows if row["method"] == OURS and not row.get("tape")]
        axes.plot([memory(row) for row in ours], [time(row) for row in ours], color=STYLES[OURS][0], linewidth=1)
        for row in rows:
            method = OURS if row["method"].startswith(OURS) else row["method"]
            colour, marker = STYLES.get(method, OTHERS)
            name = NAMES.get(method, OURS if method == OURS else "others (see the table)")
            labels[name] = axes.plot([memory(row)], [time(row)], marker, color=colour, markersize=5)[0]
        axes.set_title(f"{rows[0]['case']}, {rows[0]['tokens']:,}", loc="left", fontsize=8)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.15 * max(time(row) for row in rows))
        axes.tick_params(labelsize=7, which="both")
        ticks = [tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, linewidth=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("peak memory of one gradient (MB)", fontsize=9)
    figure.supylabel("seconds", fontsize=9)
    figure.legend(labels.values(), labels.keys(), loc="upper right", ncols=len(labels), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (2.3 * lines + 0.6)))
    return figure


TICKS = [step * 10**power for power in range(5) for step in (1, 2, 5)]


def memory(row: Row) -> float:
    return max(row["resident_bytes"] / 1e6, 0.1)


def time(row: Row) -> float:
    return row["default"]["seconds"]
