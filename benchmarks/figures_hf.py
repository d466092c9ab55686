"""Hugging Face models: the tables of memory and time, and of the longest sequence that fits into a budget."""

from __future__ import annotations

from typing import Any

from benchmarks.shown import load, origin


def huggingface_table(results: dict[str, Any]) -> str:
    """Memory and time of one gradient over plain backpropagation's, by shape, length and method."""
    methods = ["plain", "checkpointing", "ours", "ours+checkpointing"]
    rows = [row for row in results["rows"] if "failed" not in row and row["method"] != "plain"]
    shapes = [*dict.fromkeys(row["shape"] for row in results["rows"])]
    rows.sort(
        key=lambda row: (shapes.index(row["shape"]), row["vocabulary"], row["length"], methods.index(row["method"]))
    )
    lines = [
        "| model | tokens | chunk | method | memory, MB | over plain | seconds | over plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {same_sequence(row): row for row in results["rows"] if row["method"] == "plain" and "failed" not in row}
    shown = set[tuple[Any, ...]]()
    for row in rows:
        reference = plain.get(same_sequence(row))
        for one in [row] if reference is None or same_sequence(row) in shown else [reference, row]:
            lines.append(huggingface_line(one, reference))
        shown.add(same_sequence(row))
    return "\n".join(lines)


def same_sequence(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows that are compared share."""
    return row["shape"], row["length"], row["vocabulary"], row["lora"], row["device"]


def huggingface_line(row: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """One row, beside plain backpropagation of the same sequence where that was run."""
    seconds = row.get("seconds", row["first_seconds"])
    memory, time = "–", "–"
    if plain is not None:
        memory = f"{row['peak_bytes_above'] / plain['peak_bytes_above']:.2f}"
        time = f"{seconds / plain.get('seconds', plain['first_seconds']):.2f}"
    what = row["shape"] + (f", LoRA {row['lora']}" if row["lora"] else "")
    what += f", {row['vocabulary']:,} words" if row["vocabulary"] else ""
    chunk = f"{row['chunk']:,}" if row["method"].startswith("ours") else ""
    return (
        f"| {what} | {row['length']:,} | {chunk} | {row['method']} | {row['peak_bytes_above'] / 1e6:,.0f} | {memory} | "
        f"{seconds:,.1f} | {time} |"
    )


def longest_table(results: dict[str, Any]) -> str:
    """The longest sequence by model and method, over plain backpropagation's."""
    methods = ["plain", "checkpointing", "ours", "ours+checkpointing"]
    lines = ["| model | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        own = {row["method"]: row for row in results["rows"] if row["shape"] == shape}
        cells = [longest_cell(own.get(method), own.get("plain")) for method in methods]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def longest_cell(row: dict[str, Any] | None, plain: dict[str, Any] | None) -> str:
    """Tokens, and how many times plain backpropagation's these are."""
    if row is None or row.get("longest") is None:
        return "not measured" if row is None or "failed" not in row else row["failed"]
    tokens = f"{row['longest']:,}"
    if plain is None or row is plain or not plain.get("longest"):
        return tokens
    return f"{tokens} ({row['longest'] / plain['longest']:.0f} times)"


def huggingface_blocks() -> dict[str, str]:
    """Those of the guide to Hugging Face models."""
    found: dict[str, str] = {}
    for name in ("huggingface", "huggingface-cuda"):
        results = load(name)
        machine, device = results["machine"], name.partition("-")[2]
        command = "python -m benchmarks.huggingface" + (f" --device {device}" if device else "")
        chips = [row["machine"].get("gpu", row["machine"]["cpu"]) for row in results["rows"] if "machine" in row]
        several = {chip: chips.count(chip) for chip in dict.fromkeys(chips)}
        chip = " and ".join(f"{name} ({count} rows)" for name, count in several.items())
        chip = chip if len(several) > 1 else machine.get("gpu", machine["cpu"])
        where = f"{chip}, torch {machine['torch']}, Python {machine['python']}"
        found[name] = f"{huggingface_table(results)}\n\nMeasured by `{command}`: {where}. Each row has its own case."
    longest = load("hf_longest")
    found["longest"] = f"{longest_table(longest)}\n\nMeasured by {origin(longest)}"
    return found
