"""What docs/results.md shows of texts: bits per byte, ours beside compressors, a 6-gram model and an LSTM."""

from __future__ import annotations

from typing import Any

CORPORA = ("dickens", "Moby-Dick", "lambda_virus")
MODELS = {
    "slimgrad": "`slimgrad train`, nothing said",
    "LSTM": "torch's LSTM, as many parameters and CPU seconds",
    "6-gram": "6-gram, interpolated Kneser-Ney",
    "xz -9e": "`xz -9e`",
    "bzip2 -9": "`bzip2 -9`",
    "zstd --ultra -22": "`zstd --ultra -22`",
}


def texts_table(results: dict[str, Any]) -> str:
    """A line for each model, a column for each corpus; of what has several learning rates, the best and the others."""
    rows = results["rows"]
    sizes = {row["corpus"]: (row["train_bytes"], row["held_out_bytes"]) for row in rows if "train_bytes" in row}
    columns = [f"{corpus} ({sizes[corpus][0]:,} / {sizes[corpus][1]:,})" for corpus in CORPORA]
    lines = [
        "| corpus (bytes to learn from / held out) | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for model, words in MODELS.items():
        cells = [cell([row for row in rows if (row["corpus"], row["model"]) == (one, model)]) for one in CORPORA]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *trained_lines(rows)])


def cell(rows: list[dict[str, Any]]) -> str:
    """Bits per byte: the best, and in brackets with their learning rates what there is beside it."""
    best, *others = sorted(rows, key=lowest)
    if not others:
        return in_words(best)
    rest = "; ".join(f"{row['learning_rate']:g}: {in_words(row)}" for row in others)
    return f"{in_words(best)} (rate {best['learning_rate']:g}; {rest})"


def in_words(row: dict[str, Any]) -> str:
    """At the end, and where that is no longer the best, at the best of the looks on the way."""
    bits = f"{row['bits_per_byte']:.3f}"
    return bits + (f", at its best {lowest(row):.3f}" if row["bits_per_byte"] > lowest(row) + 0.005 else "")


def lowest(row: dict[str, Any]) -> float:
    """Bits per byte at the best of the looks on the way, where there were any."""
    return row.get("lowest_bits_per_byte", row["bits_per_byte"])


def trained_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Of what is trained, the best: parameters, CPU seconds, bytes seen, steps."""
    lines = ["| trained | parameters | CPU seconds | bytes seen | steps |", "|---|---|---|---|---|"]
    for corpus in CORPORA:
        for model in ("slimgrad", "LSTM"):
            ones = [row for row in rows if (row["corpus"], row["model"]) == (corpus, model)]
            best = min(ones, key=lowest)
            lines.append(
                f"| {model}, {corpus} | {best['parameters']:,} | {best['cpu_seconds']:.0f} | {best['bytes_seen']:,} | "
                f"{best['steps']:,} |"
            )
    return lines
