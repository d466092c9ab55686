"""From committed results to what README and guides show: the pictures, and the tables between markers.

python -m benchmarks.figures           # rewrites docs/images/*.png and the tables of `PAGES`
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.figures_budget import (
    budget_blocks,
    draw_budget,
    draw_whole_text,
    whole_text_sentence,
)
from benchmarks.figures_hf import huggingface_blocks
from benchmarks.figures_joint import draw_joint, joint_block, readme_block
from benchmarks.figures_memory import draw_memory
from benchmarks.figures_published import published_blocks
from benchmarks.figures_texts import texts_table
from benchmarks.shown import IMAGES, LABELS, ROOT, load, origin
from slimgrad.paper import report
from slimgrad.paper.catalogue import labelled


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
            if row is None:
                cells.append("not run")
            else:
                cells.append(f"{row['resident_bytes_default'] / 1e6:.0f} ({row['live_bytes'] / 1e6:.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    ours = sorted((r for r in rows if r["method"] == "rebuild"), key=lambda r: r["length"])
    first, last = ours[0], ours[-1]
    lines += [
        "",
        "Not run: plain backpropagation and checkpointing, whose memory is proportional to the length, over more "
        "tokens than that.",
        "",
        "What grows with `Rebuild()` is what the allocator leaves between its blocks. With blocks mapped one by one "
        f"(`MALLOC_MMAP_THRESHOLD_=65536`) it takes {first['resident_bytes_mapped'] / 1e6:.1f} MB at "
        f"{first['length']:,} tokens and {last['resident_bytes_mapped'] / 1e6:.1f} MB at {last['length']:,}.",
    ]
    return "\n".join(lines)


def bf16_table(results: dict[str, Any]) -> str:
    """Time and error of one gradient in bfloat16 beside float32, plain and chunked."""
    lines = [
        "| configuration | tokens | chunk | gradient | float32, s | bf16, s | float32's error | bf16's error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["model"], row["way"], row["precision"]): row for row in results["rows"]}
    for (model, way, precision), wide in rows.items():
        if precision == "float32":
            narrow = rows[model, way, "bf16"]
            chunk = "" if way == "plain" else f"{wide['chunk']:,}"
            lines.append(
                f"| {model} | {wide['length']:,} | {chunk} | {way} | {wide['seconds']:.2f} | {narrow['seconds']:.2f} | "
                f"{wide['error']:.1e} | {narrow['error']:.1e} |"
            )
    same = [row["model"] for row in rows.values() if row.get("same_bits")]
    lines += ["", f"`Rebuild()` and `Keep()` agree in every bit in bfloat16: {', '.join(same) or 'nowhere'}."]
    return "\n".join(lines)


def training_table(results: dict[str, Any]) -> str:
    """Bits per byte of each run, and how far its curve is from plain backpropagation's."""
    lines = [
        "| corpus | model | gradient | bytes seen | minutes | validation, bits per byte | training curve off plain's |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in results["rows"] if "how" not in row]
    for row in shown:
        rate = f", learning rate {row['learning_rate']:g}" if row["model"] == "paper" else ""
        seed = ", another seed" if row["seed"] else ""
        apart = distance(row["from_plain"]["mean"]) if "from_plain" in row else ""
        lines.append(
            f"| {row['corpus']} | {row['model']}{rate} | {row['method']}{seed} | {row['bytes']:,} | "
            f"{row['minutes']:.1f} | {row['validation_bits']:.3f} | {apart} |"
        )
    lines += ["", "| from, then | how | training curve, off the uninterrupted one | validation |", "|---|---|---|---|"]
    for row in results["rows"]:
        if "how" in row:
            apart = row["from_uninterrupted"]
            lines.append(
                f"| {row['method']} | `{row['how']}` | {distance(apart['mean'])} "
                f"(largest {distance(apart['largest'])}) | {distance(apart['validation'])} |"
            )
    return "\n".join(lines)


def distance(bits: float) -> str:
    """As a number that shows whether it is nothing, rounding, or something."""
    return f"{bits:.2f}" if bits >= 0.005 else f"{bits:.0e}" if bits else "0"


def streaming_table(results: dict[str, Any]) -> str:
    """Evaluation of a file as one sequence, and the cost of a token early and late."""
    lines = ["| what | time | memory of the process | |", "|---|---|---|---|"]
    for row in results["rows"]:
        if row["what"] == "eval":
            speed = f"{row['seconds']:,} s, {row['bytes'] / row['seconds']:,.0f} bytes/s"
            what = f"`slimgrad eval --chunk {row['chunk']}`, {row['bytes']:,} bytes as one sequence"
            what += f" ({row['model']})"
            bits = f"{row['bits_per_byte']:.3f} bits per byte"
            lines.append(f"| {what} | {speed} | at most {row['peak_resident_mb']} MB | {bits} |")
        else:
            speed, memory = f"{1e3 * row['median_seconds']:.2f} ms", f"{row['resident_bytes'] / 1e6:.0f} MB"
            lines.append(
                f"| generation, from token {row['token']:,} on ({row['model']}) | {speed} a token | {memory} | |"
            )
    return "\n".join(lines)


def small_device_table(results: dict[str, Any]) -> str:
    """Limits on a process' data under which fine-tuning dies and finishes."""
    lines = [
        "| sequence | gradient | dies at | finishes at | the same model as without a limit |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        chunk = f", chunks of {row['chunk']}" if row["method"] == "chunked" else ""
        lines.append(
            f"| {row['length']:,} bytes | {row['method']}{chunk} | {row['dies_at_mb']:,} MB | "
            f"{row['finishes_at_mb']:,} MB | {'yes, in every bit' if row['same_model_as_without_limit'] else 'no'} |"
        )
    bases = sorted({row["base_mb"] for row in results["rows"]})
    between = f"{bases[0]}" if len(bases) == 1 else f"{bases[0]} to {bases[-1]}"
    lines += ["", f"Of each limit, Python and torch take {between} MB before any work."]
    return "\n".join(lines)


TABLES = {
    "memory": memory_table,
    "bf16": bf16_table,
    "training": training_table,
    "texts": texts_table,
    "streaming": streaming_table,
    "small_device": small_device_table,
}


# apart: other shares of the steps
LONGER, BOOKS, TRAINED = "reproduce-copying/rows", "reproduce-books/rows", "reproduce-finetuning/rows"


def reproduce_table(results: dict[str, Any]) -> str:
    """One line for each of the paper's experiments, and for what stands beyond them."""
    rows = labelled(results["rows"])
    found = {name: make([row for row in rows if "result" in row]) for name, make in report.TABLES.items()}
    costs = {
        (cost["configuration"], cost["malloc"]): cost["of_plain_memory"]
        for cost in found["tradeoff-memory"]
        if (cost["form"], cost["method"], cost["chunk"]) == ("blocked", "chunked", 256)
    }
    memory = [
        f"{name}: {share:.3f}" + (f" ({costs[name, 'default']:.2f})" if (name, "default") in costs else "")
        for (name, malloc), share in costs.items()
        if malloc == "returned"
    ]
    times = [
        f"{time['configuration']}: {time['of_plain_time']:.2f}"
        for time in found["tradeoff-time"]
        if (time["form"], time["malloc"], time["method"], time["chunk"]) == ("blocked", "default", "chunked", 256)
    ]
    errors = [e for e in found["precision"] if e["over"] == "lengths"]
    spans = [
        f"{way} {min(ratios):.2f} to {max(ratios):.2f}"
        for way in ("slimgrad", "subtracted, float32", "subtracted, float64")
        for ratios in [[e["of_plain_float32"] for e in errors if e["way"] == way]]
    ]
    most = max(entry["chunks"] for entry in found["precision-drift"])
    drifts = [f"{e['way']} {e['drift']:.0e}" for e in found["precision-drift"] if e["chunks"] == most]
    lines = [
        "| experiment | found |",
        "|---|---|",
        f"| a: memory of plain's, C = 256, freed blocks returned (by default malloc) | {'; '.join(memory)} |",
        f"| a: time of plain's, C = 256, default malloc | {'; '.join(times)} |",
        f"| b: error over plain float32's own, 1,024 to {max(e['length'] for e in errors):,} tokens, C = "
        f"{errors[0]['chunk']} | {'; '.join(spans)} |",
        f"| b: drift of the state after {most:,} chunks | {'; '.join(drifts)} |",
    ]
    lines += compatibility_lines(found["compatibility"])
    for more in (LONGER, BOOKS):
        lines += compatibility_lines(report.TABLES["compatibility"](labelled(load(more)["rows"])))
    chunked, plain = load("spike")["rows"]
    lines.append(
        f"| c: the spike of copying's curve at C = 128 | {max(chunked['bits']):.2f} bits at step "
        f"{at_largest(chunked):,}; plain backpropagation from the same state {max(plain['bits']):.2f} at step "
        f"{at_largest(plain):,}; gradients at most {max(chunked['off_plain']):.0e} apart |"
    )
    lines += finetuning_lines(rows) + finetuning_lines(labelled(load(TRAINED)["rows"]))
    far = max(entry["horizon"] for entry in found["horizon"])
    right = [f"{e['gradient']} {e['accuracy']:.0%} right" for e in found["horizon"] if e["horizon"] == far]
    lines.append(f"| e: a memory of {far:,} tokens, in chunks of 64 | {', '.join(right)} |")
    done = len(results["rows"])
    if done < results["points"]:
        lines += ["", f"Not whole: {done} of the programme's {results['points']} points were measured."]
    return "\n".join(lines)


def compatibility_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line for each task: final bits, how much is right, and curves off plain's over the noise."""
    lines: list[str] = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        runs = [entry for entry in entries if entry["task"] == task]
        plain = next(entry for entry in runs if (entry["way"], entry["seed"]) == ("plain", 0))
        seeds = [entry for entry in runs if entry["way"] == "plain" and entry is not plain]
        mixed = [entry for entry in runs if entry is not plain and entry not in seeds]
        found = [f"plain {plain['final_bits']:.4f}", f"chunked and half {span(mixed, 'final_bits', '.4f')}"]
        if seeds:
            found.append(f"other seeds {span(seeds, 'final_bits', '.4f')}")
        found[-1] += f"; right: {span(runs, 'final_accuracy', '.2%')}"
        if seeds:
            found[-1] += f"; curves off plain's, over other seeds' mean: {span(mixed, 'of_noise', '.2g')}"
            found.append(f"other seeds {span(seeds, 'of_noise', '.2f')}")
        share = f"{100 * plain['share']:g}% of the steps"
        lines.append(f"| c: {task}, {share}, bits per byte | {', '.join(found)} |")
    return lines


def finetuning_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for the model: how far it was trained, and what a step of each rate helps at the first chunk."""
    entries = report.TABLES["finetuning"](rows)
    first = entries[0]
    found = [
        f"rate {entry['rate']}: {entry['gain']:+.5f} ± {entry['gain_confidence']:.5f} ({entry['stretches']:,})"
        for entry in entries
        if entry["chunk"] == first["chunk"]
    ]
    what = f"{first['model']}, trained for {100 * first['trained']:g}% of the steps ({first['bits_without']:.2f} bits)"
    return [f"| d: {what}, bits per byte gained by one step, C = {first['chunk']} (stretches) | {'; '.join(found)} |"]


def span(entries: list[dict[str, Any]], key: str, spec: str) -> str:
    """The least and the largest of a key's values; one, where they look the same."""
    least, most = (f"{found(entry[key] for entry in entries):{spec}}" for found in (min, max))
    return least if least == most else f"{least} to {most}"


def at_largest(found: dict[str, Any]) -> int:
    """The step whose loss is the largest."""
    return found["steps"][found["bits"].index(max(found["bits"]))]


def readme_blocks() -> dict[str, str]:
    """What is between each pair of markers in the README."""
    return {"costs": readme_block(load("joint")) + whole_text_sentence(load("whole_text"))}


def results_blocks() -> dict[str, str]:
    """What is between each pair of markers in the page of results."""
    found: dict[str, str] = {}
    for name, table in TABLES.items():
        results = load(name)
        found[name] = f"{table(results)}\n\nMeasured by {origin(results)}"
    found["joint"] = joint_block(load("joint"))
    found["reproduce"] = reproduce_table(load("reproduce/rows"))
    return found


PAGES = {
    "README.md": readme_blocks,
    "docs/results.md": results_blocks,
    "docs/huggingface.md": huggingface_blocks,
    "docs/budget.md": budget_blocks,
    "docs/reproduce.md": published_blocks,
}


def filled(page: str) -> str:
    """A page with its tables made anew from the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, block in PAGES[page]().items():
        pattern = re.compile(f"(<!-- results: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no '<!-- results: {name} -->' ... '<!-- end -->'")
        text = pattern.sub(lambda match, block=block: match[1] + block + match[2], text)
    return text


def draw_training(plt: Any) -> None:
    """Validation over the bytes seen: the three ways to the gradient lie on one another."""
    rows = [row for row in load("training")["rows"] if "how" not in row]
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    figure, panels = plt.subplots(1, len(corpora), figsize=(9, 3.6), dpi=150, sharey=True)
    for corpus, axes in zip(corpora, panels, strict=True):
        for row in (r for r in rows if r["corpus"] == corpus):
            points = list(zip(*((seen / 1e6, bits) for seen, bits in row["validations"]), strict=True))
            label, style = RUNS[row["model"], "seed" if row["seed"] else row["method"]]
            rate = f" {row['learning_rate']:g}" if row["model"] == "paper" else ""
            axes.plot(*points, label=label + rate, **style)
        axes.set_title(corpus, loc="left", fontsize=11)
        axes.set_xlabel("training bytes seen (millions)")
        axes.grid(alpha=0.3, linewidth=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("validation, bits per byte")
    panels[-1].legend(frameon=False, fontsize=7.5)
    figure.tight_layout()
    figure.savefig(IMAGES / "training.png", facecolor="white")


RUNS: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("modern", "plain"): ("plain backpropagation", {"color": "#bdbdbd", "linewidth": 6}),
    ("modern", "checkpoint"): ("per-layer checkpointing", {"color": "#d98032", "linewidth": 3}),
    ("modern", "chunked"): ("slimgrad, chunks of 512", {"color": "#1f6fb4", "linewidth": 1.2}),
    ("modern", "seed"): ("slimgrad, another seed", {"color": "#1f6fb4", "linewidth": 1, "linestyle": ":"}),
    ("paper", "chunked"): ("the paper's layers, rate", {"color": "#63a36c", "linewidth": 1.2, "linestyle": "--"}),
}


def draw() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_training(plt)
    draw_joint(load("joint"))
    draw_budget(plt)
    draw_whole_text(plt)
    draw_memory()


def main() -> None:
    draw()
    for page in PAGES:
        (ROOT / page).write_text(filled(page), encoding="utf-8")


if __name__ == "__main__":
    main()
