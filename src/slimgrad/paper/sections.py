"""The report's chapters: each experiment's rows as figures, tables, and what a reader needs to read them."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from typing import Any

from slimgrad.paper.compatibility import EXPERIMENT as COMPATIBILITY
from slimgrad.paper.compatibility import preset_of, regime_name
from slimgrad.paper.horizon import CHUNK as HORIZON_CHUNK
from slimgrad.paper.horizon import EXPERIMENT as HORIZON
from slimgrad.paper.page import COLOURS, Show, figure, fixed, percent, power, table, whole, words
from slimgrad.paper.precision import EXPERIMENT as PRECISION
from slimgrad.paper.programme import Row

_AXES = {"lengths": ("length", "tokens"), "chunks": ("chunk", "C, tokens")}  # of precision: key, label
_SEVERAL = 1.5  # decades of a logarithmic axis
_CROWD = 7  # ticks
_OTHER_SEEDS = "plain, other seeds"

_SPIKE, _SETTLED = 1.0, 0.1  # bits that a group of steps rises by; share of the steps before which none is told
_UNKNOWN = """<p class="soft">The paper shows its own measurements as curves, taken on one GPU; their values are not
given as numbers, so none are set beside these.</p>"""

Columns = dict[str, tuple[str, Show]]
_TRADEOFF = """<p>One gradient of batch 1 over random tokens. Memory is the process' peak above parameters and
gradients, each point in a process of its own. Malloc is glibc's: <i>default</i>; <i>returned</i>, where freed blocks
from 1 MiB up go back to the system (<code>MALLOC_MMAP_THRESHOLD_=1048576</code>), so that the figure is what is in
use; and <i>warm</i>, where nothing goes back. <i>checkpoint</i>: each layer computed twice. Times are medians of
rounds in which plain backpropagation and every other way took turns; seconds in the memory tables are of one gradient
in a cold process. Predictions are the formulas of <code>slimgrad.paper.tradeoff</code>. What the formulas leave out:
plain backpropagation's gradients are made while its graph is already going, so that less than predicted is added to
them; small chunks have fixed costs of some megabytes; and blocks below 1 MiB, as a chunk's activations at small C are,
stay in malloc's heap, with holes between them.</p>"""
_TIMES: Columns = {
    "malloc": ("malloc", words), "form": ("form", words), "method": ("way", words), "chunk": ("C", whole),
    "rounds": ("rounds", whole), "seconds": ("seconds", fixed(2)), "of_plain_time": ("of plain's time", fixed(2)),
    "least": ("least", fixed(2)), "most": ("most", fixed(2)),
    "predicted_flops": ("predicted FLOPs of plain's", fixed(2)), "time_over_flops": ("time / FLOPs", fixed(2)),
}  # fmt: skip
_COSTS: Columns = {
    "form": ("form", words), "malloc": ("malloc", words), "method": ("way", words), "chunk": ("C", whole),
    "peak_mb": ("peak, MB", fixed(1)), "predicted_mb": ("predicted, MB", fixed(1)),
    "measured_over_predicted": ("measured / predicted", fixed(2)), "of_plain_memory": ("of plain's memory", fixed(3)),
    "seconds": ("seconds, cold", fixed(2)), "note": ("", words),
}  # fmt: skip
_PRECISION = """<p>Error of a gradient: its distance from the float64 gradient, over that gradient's length. Plain
float32's own error is beside it: what the arithmetic itself costs. <i>subtracted</i>: Algorithm 1 as published,
whose state is rolled back by subtracting what was added. The float64 truth is plain backpropagation's up to 131,072
tokens (slimgrad in float64 is at most {largest} off it), beyond that slimgrad's in float64. Errors are means over the
stretches of text that were taken, ratios are of those means; <i>least</i> and <i>most</i> are of one stretch. The
state's drift, below, grows with the chunks, but with these models and lengths it is not yet what the published
gradient's error is made of. The subtracting ways form each chunk's weight gradients apart and then add them; slimgrad
adds the products into their place, which saves a copy and rounds a little more often.</p>"""
_ERRORS: Columns = {
    "weights": ("weights", words), "over": ("over", words), "length": ("tokens", whole), "chunk": ("C", whole),
    "way": ("way", words), "stretches": ("stretches", whole), "error": ("error", power),
    "plain_float32": ("plain float32's error", power), "of_plain_float32": ("of plain float32's", fixed(2)),
    "least": ("least", fixed(2)), "most": ("most", fixed(2)),
}  # fmt: skip
_DRIFT = """<p>What is left of the state when it was rolled back to the beginning, where it should be zero, over the
state after the first chunk: how wrong the state is that the earliest chunks are rebuilt from. slimgrad's is that of
its accumulators, in all of their bits.</p>"""
_DRIFTS: Columns = {
    "length": ("tokens", whole), "chunks": ("chunks", whole), "way": ("way", words), "drift": ("drift", power),
}  # fmt: skip
_RUNS: Columns = {
    "regime": ("regime", words), "steps": ("steps", whole), "share": ("of the published", percent),
    "final_bits": ("validation, bits per byte", fixed(4)), "final_accuracy": ("right", percent),
    "validation_largest": ("validation off plain's, largest", power),
    "curve_mean": ("training curve off plain's, mean", power), "curve_median": ("median", power),
    "curve_largest": ("largest", power), "of_noise": ("mean over the seeds' mean", fixed(2)),
    "minutes": ("minutes", fixed(1)),
}  # fmt: skip
_COMPATIBILITY = """<p>Plain backpropagation throughout; chunked throughout; plain for the first half of the steps,
then chunked. One seed and one order of data; the number in a regime is the chunk, C. Plain runs with other seeds are
the noise that differences are held against: below 1 in the column of the seeds' mean, a curve is nearer to plain's than
another seed's is on the average. Curves are compared in groups of steps. Minutes of a half regime include the plain
half.</p>"""
_STEPS: Columns = {
    "model": ("model", words), "trained": ("of the published steps", percent), "chunk": ("C", whole),
    "rate": ("rate", words), "stretches": ("stretches", whole),
    "bits_without": ("bits without", fixed(4)), "bits_with": ("bits with", fixed(4)), "gain": ("gain", fixed(4)),
    "gain_confidence": ("±", fixed(4)), "helped": ("helped", percent),
    "largest_gradient_difference": ("largest gradient difference", power), "peak_mb": ("peak, MB", fixed(1)),
    "plain_peak_mb": ("plain's, MB", fixed(1)),
}  # fmt: skip
_FINETUNING = """<p>The plain models of (c) read random stretches of validation text. One step of gradient descent on
the first half's loss; bits per byte on the second half, without and with it. A positive gain means that the step
helps; ± is a 95 % confidence interval of the mean. 0.01 is the published rate. Memory: peak above parameters and
gradients of the first half's gradient, freed blocks returned; plain backpropagation's gradients come to be while its
graph is already going, a chunked sweep holds them from its first chunk on.</p>"""
_HORIZONS: Columns = {
    "horizon": ("horizon, tokens", whole), "chunks": ("chunks", whole), "gradient": ("gradient", words),
    "seeds": ("seeds", whole), "accuracy": ("right, mean", percent), "worst": ("worst", percent),
    "best": ("best", percent), "chance": ("chance", percent),
}  # fmt: skip
_HORIZON = f"""<p>The first token is one of eight symbols, noise follows, and the symbol is asked for at the end. A
gated recurrence trains in chunks of {HORIZON_CHUNK} tokens. Exact gradients cross every chunk's edge; truncated ones
(the state is detached between chunks) end at the last. At one chunk the two are the same.</p>"""
_SIZES: Columns = {
    "state": ("state", words), "method": ("way", words), "length": ("tokens", whole), "chunk": ("C", whole),
    "peak_mb": ("peak, MB", fixed(2)), "seconds": ("seconds", fixed(2)), "note": ("", words),
}  # fmt: skip
_LENGTHS = """<p>Small models whose state is a prefix sum, a gated recurrence, a sliding window, or a cache of keys
and values. A cache grows with the length, as attention does, so its chunked memory is linear; plain it is quadratic
here, for the mask of one graph. Sums are rolled back, so nothing of theirs is kept. Of gates and a window one state per
chunk is kept, which is what grows there (<code>Binomial</code> keeps a fixed number). Peak above parameters and
gradients, blocks from 64 KiB up returned when freed.</p>"""
_SCHEDULES: Columns = {
    "schedule": ("schedule", words), "peak_mb": ("peak, MB", fixed(1)), "seconds": ("seconds", fixed(2)),
    "over_rebuild": ("over Rebuild's time", fixed(2)),
    "same_bits": ("Rebuild's gradient in every bit", lambda same: "yes" if same else "no"),
}  # fmt: skip
_SCHEDULED = """<p>One gradient of a Performer with a large state over {chunks:,} chunks. Times are medians of rounds
in which the schedules took turns.</p>"""


def tradeoff(costs: list[Row], times: list[Row]) -> str:
    """Memory over the chunk, measured and predicted; time over plain's."""
    if not costs and not times:
        return ""
    parts = [_TRADEOFF, _UNKNOWN]
    for name in dict.fromkeys(entry["configuration"] for entry in (*costs, *times)):
        own = [entry for entry in costs if entry["configuration"] == name]
        timed = [entry for entry in times if entry["configuration"] == name]
        length = (own or timed)[0]["length"]
        parts.append(f"<h3>{html.escape(name)}: {length:,} tokens</h3>")
        drawings = [_draw_memory(own)] if own else []
        parts.append(figure(f"configuration {name}", *drawings, *([_draw_times(timed)] if timed else [])))
        parts.append(_at_chunk(own, timed, 256))
        parts.append(table(timed, _TIMES, folded="Time"))
        parts.append(table(own, _COSTS, folded="Memory"))
    return "".join(parts)


def precision(entries: list[Row], drifts: list[Row], rows: list[Row]) -> str:
    """Errors over the length and over the chunk, and the drift of the state."""
    if not entries:
        return ""
    off = [row["result"]["truth_off"] for row in rows if row["experiment"] == PRECISION and "chunks" in row["task"]]
    largest = max((value for value in off if value is not None), default=math.nan)
    parts = [_PRECISION.format(largest=f"{largest:.0e}"), _UNKNOWN]
    for weights in dict.fromkeys(entry["weights"] for entry in entries):
        own = {over: [e for e in entries if e["weights"] == weights and e["over"] == over] for over in _AXES}
        drawings = [_draw_errors(own[over], *axis) for over, axis in _AXES.items() if own[over]]
        parts.append(f"<h3>{weights} weights</h3>{figure(f'errors with {weights} weights', *drawings)}")
    ours = [entry for entry in entries if entry["way"] == "slimgrad" and entry["over"] == "lengths"]
    parts.append(_draw_drift(drifts))
    return "".join([*parts, table(ours, _ERRORS), table(entries, _ERRORS, folded="Every way")])


def compatibility(entries: list[Row], rows: list[Row]) -> str:
    """Curves of each task, and how far they are from plain backpropagation's."""
    parts: list[str] = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        runs = [row for row in rows if row["experiment"] == COMPATIBILITY and row["labels"]["task"] == task]
        parts += [
            f"<h3>{html.escape(task)}: {own[0]['length']:,} tokens a step</h3>",
            figure(f"training on {task}", *_draw_runs(runs), height=4.0),
            _spikes(runs),
            table(own, _RUNS),
            f"<p>The preset: as published, {preset_of(task).steps:,} steps.</p>",
        ]
    if parts:
        parts.insert(0, _COMPATIBILITY + _UNKNOWN)
    return "".join(parts)


def _spikes(runs: list[Row]) -> str:
    """Where a curve of one seed jumps up, in words, since a reader will ask whether its gradient was wrong."""
    found: list[str] = []
    for row in runs:
        steps, bits = row["result"]["steps"], row["result"]["bits"]
        rises = [(after - before, at) for before, after, at in zip(bits, bits[1:], range(1, len(bits)), strict=False)]
        late = [(rise, at) for rise, at in rises if steps[at] > _SETTLED * steps[-1]]
        rise, at = max(late, default=(0.0, 0))
        if rise > _SPIKE:
            found.append(f"{html.escape(regime_name(row['labels']))} at step {steps[at]:,} ({bits[at]:.2f} bits)")
    if not found:
        return ""
    return (
        f"<p>Spikes: {'; '.join(found)}. A spike in a chunked run alone would be a fault; whether plain "
        "backpropagation has it too when it begins from the same state is what <code>python -m "
        "benchmarks.spike</code> measures.</p>"
    )


def finetuning(entries: list[Row]) -> str:
    """The table of what one step is worth."""
    if not entries:
        return ""
    return _FINETUNING + _UNKNOWN + table(entries, _STEPS)


def horizon(entries: list[Row], rows: list[Row]) -> str:
    """Accuracy over the horizon, exact and truncated."""
    if not entries:
        return ""
    longest = max(entry["horizon"] for entry in entries)

    def accuracy(axes: Any) -> None:
        for colour, gradient in zip(COLOURS, ("exact", "truncated"), strict=False):
            own = [entry for entry in entries if entry["gradient"] == gradient]
            x = [entry["horizon"] for entry in own]
            axes.plot(x, [entry["accuracy"] for entry in own], "o-", color=colour, label=gradient)
            axes.fill_between(x, [e["worst"] for e in own], [e["best"] for e in own], color=colour, alpha=0.2)
        axes.axhline(entries[0]["chance"], color=COLOURS[-1], linestyle=":", label="chance")
        axes.set(xlabel="horizon, tokens", ylabel="right", xscale="log", ylim=(0, 1.05))
        axes.set_xscale("log", base=2)

    def losses(axes: Any) -> None:
        for colour, gradient in zip(COLOURS, ("exact", "truncated"), strict=False):
            own = [row for row in rows if row["experiment"] == HORIZON and row["task"]["gradient"] == gradient]
            runs = [row for row in own if row["task"]["horizon"] == longest]
            for index, run in enumerate(runs):
                axes.plot(run["result"]["losses"], color=colour, label=gradient if not index else None)
        axes.set(xlabel=f"training at {longest:,} tokens, groups of steps", ylabel="loss, nats")

    return _HORIZON + figure("accuracy over the horizon", accuracy, losses) + table(entries, _HORIZONS)


def lengths(entries: list[Row]) -> str:
    """Memory over the length for each kind of state."""
    if not entries:
        return ""

    def draw(axes: Any) -> None:
        for colour, state in zip(COLOURS, dict.fromkeys(entry["state"] for entry in entries), strict=False):
            for method, line in (("plain", "--"), ("chunked", "o-")):
                own = [e for e in entries if e["state"] == state and e["method"] == method and e["peak_mb"] > 0]
                label = state if method == "chunked" else None
                axes.plot([e["length"] for e in own], [e["peak_mb"] for e in own], line, color=colour, label=label)
        axes.plot([], [], "--", color=COLOURS[-1], label="plain backpropagation")
        axes.set(xlabel="tokens", ylabel="peak, MB", xscale="log", yscale="log")

    return _LENGTHS + figure("memory against length", draw) + table(entries, _SIZES)


def schedules(entries: list[Row]) -> str:
    """Memory and time of each schedule."""
    if not entries:
        return ""
    return _SCHEDULED.format(chunks=entries[0]["chunks"]) + table(entries, _SCHEDULES)


def _at_chunk(costs: list[Row], times: list[Row], chunk: int) -> str:
    """What was measured at one chunk, in words: the figure that people ask for first."""
    memory = [
        f"{entry['of_plain_memory']:.3f} of plain's memory ({entry['peak_mb']:.0f} MB, malloc {entry['malloc']})"
        for entry in costs
        if (entry["form"], entry["method"], entry["chunk"]) == ("blocked", "chunked", chunk)
        and not math.isnan(entry["of_plain_memory"])
    ]
    time = [
        f"{entry['of_plain_time']:.2f} of its time (malloc {entry['malloc']})"
        for entry in times
        if entry["form"] == "blocked" and entry["method"] == "chunked" and entry["chunk"] == chunk
    ]
    return f"<p>C = {chunk}, blocked form: {', '.join(memory + time)}.</p>" if memory or time else ""


def _draw_memory(costs: list[Row]) -> Callable[[Any], None]:
    """Peak memory over the chunk, measured and predicted, with plain backpropagation as a level."""

    def draw(axes: Any) -> None:
        kinds = dict.fromkeys((entry["form"], entry["malloc"]) for entry in costs)
        for colour, (form, malloc) in zip(COLOURS, kinds, strict=False):
            own = [entry for entry in costs if (entry["form"], entry["malloc"]) == (form, malloc)]
            chunked = [entry for entry in own if entry["method"] == "chunked"]
            chunks = [entry["chunk"] for entry in chunked]
            axes.plot(chunks, [e["peak_mb"] for e in chunked], "o-", color=colour, label=f"{form}, {malloc}")
            axes.plot(chunks, [e["predicted_mb"] for e in chunked], ":", color=colour)
            for entry in own:
                if entry["method"] == "plain" and not math.isnan(entry["peak_mb"]):
                    axes.axhline(entry["peak_mb"], color=colour, linestyle="--", linewidth=1)
        axes.plot([], [], ":", color=COLOURS[-1], label="predicted")
        axes.plot([], [], "--", color=COLOURS[-1], linewidth=1, label="plain backpropagation")
        axes.set(ylabel="peak, MB", yscale="log")
        _chunk_axis(axes, {entry["chunk"] for entry in costs})

    return draw


def _draw_times(times: list[Row]) -> Callable[[Any], None]:
    """Time over plain's against the chunk, and the FLOPs predicted."""

    def draw(axes: Any) -> None:
        kinds = dict.fromkeys((entry["form"], entry["malloc"]) for entry in times)
        for colour, (form, malloc) in zip(COLOURS, kinds, strict=False):
            own = [e for e in times if (e["form"], e["malloc"], e["method"]) == (form, malloc, "chunked")]
            chunks = [entry["chunk"] for entry in own]
            axes.plot(chunks, [e["of_plain_time"] for e in own], "o-", color=colour, label=f"{form}, {malloc}")
        own = sorted((e for e in times if e["method"] == "chunked"), key=lambda e: e["chunk"])
        flops = [entry["predicted_flops"] for entry in own]
        axes.plot([entry["chunk"] for entry in own], flops, ":", color=COLOURS[-1], label="FLOPs, predicted")
        axes.axhline(1, color=COLOURS[-1], linestyle="--", linewidth=1, label="plain backpropagation")
        axes.set(ylabel="time of plain's")
        _chunk_axis(axes, {entry["chunk"] for entry in own})

    return draw


def _chunk_axis(axes: Any, chunks: set[int]) -> None:
    """Chunks on a logarithmic axis, with their own numbers at it: every second one, where all would crowd."""
    axes.set(xlabel=_AXES["chunks"][1], xscale="log")
    ticks = sorted(chunks)
    ticks = ticks[:: 1 + len(ticks) // _CROWD]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _draw_errors(entries: list[Row], axis: str, label: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for colour, way in zip(COLOURS, dict.fromkeys(entry["way"] for entry in entries), strict=False):
            own = [entry for entry in entries if entry["way"] == way]
            axes.plot([e[axis] for e in own], [e["error"] for e in own], "o-", color=colour, label=way)
        once = {entry[axis]: entry["plain_float32"] for entry in entries}
        axes.plot(list(once), list(once.values()), "--", color=COLOURS[-1], label="plain float32")
        axes.set(xlabel=label, ylabel="error", xscale="log", yscale="log")
        if axis == "chunk":
            _chunk_axis(axes, set(once))
        low, high = axes.get_ylim()
        if math.log10(high / low) < _SEVERAL:  # else the axis shows no power of ten to read it by
            axes.set_ylim(low / 3, high * 3)

    return draw


def _draw_drift(drifts: list[Row]) -> str:
    def draw(axes: Any) -> None:
        for colour, way in zip(COLOURS, dict.fromkeys(entry["way"] for entry in drifts), strict=False):
            own = [entry for entry in drifts if entry["way"] == way and entry["drift"]]  # zero has no logarithm
            if own:
                axes.plot([e["chunks"] for e in own], [e["drift"] for e in own], "o-", color=colour, label=way)
        axes.set(xlabel="chunks", ylabel="drift, where it is not zero", xscale="log", yscale="log")

    if not drifts:
        return ""
    return f"<h3>Drift of the state</h3>{_DRIFT}{figure('drift of the state', draw)}{table(drifts, _DRIFTS)}"


def _draw_runs(runs: list[Row]) -> list[Callable[[Any], None]]:
    """Training and validation over the steps."""

    def draw(steps: str, bits: str, ylabel: str) -> Callable[[Any], None]:
        def one(axes: Any) -> None:
            for row in runs:
                result = row["result"]
                label, style = regime_name(row["labels"]), {}
                if row["labels"]["seed"]:
                    named = _OTHER_SEEDS in axes.get_legend_handles_labels()[1]
                    label, style = f"_{label}" if named else _OTHER_SEEDS, {"linestyle": ":", "color": COLOURS[-1]}
                axes.plot(result[steps], result[bits], linewidth=1, label=label, **style)
            axes.set(xlabel="steps", ylabel=ylabel)

        return one

    return [
        draw("steps", "bits", "training, bits per byte"),
        draw("validation_steps", "validation_bits", "validation, bits per byte"),
    ]


def configuration(rows: list[Row]) -> str:
    """What each point was: its task and what its process had set, word for word."""
    if not rows:
        return ""
    lines = (
        f"{row['name']}: {json.dumps(row['task'])}"
        + (f" with {json.dumps(row['environment'])}" if "environment" in row else "")
        for row in rows
    )
    return f"<details><summary>Configuration</summary><pre>{html.escape(chr(10).join(lines))}</pre></details>"
