"""Every causal type of transformers' registry: exact in chunks, refused with its reason, or not buildable.

    python -m benchmarks.hf_table               # five minutes on two cores; goes on where it was interrupted
    python -m benchmarks.hf_table llama mamba   # these anew

Each type is certified (`slimgrad.hf.certifying`) in a process of its own, with a limit of time and of memory, from its
configuration class' defaults, or from fields as in published models where the defaults make no model. Types that can be
encoder or decoder are built as decoders. So are configurations of published models (`hf_published`). Writes
results/hf_table.json and docs/huggingface-models.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import slimgrad
from benchmarks.hf_published import CONFIGURATIONS, configuration
from benchmarks.measure import RESULTS, save
from slimgrad.hf.certifying import certify_class

DOCUMENT = RESULTS.parent.parent / "docs" / "huggingface-models.md"
SECONDS, GIBIBYTES, JOBS = 60, 9, 2  # of processor time; of addresses; at a time
NOT_BUILT = ("its class could not be built", "its own forward fails", "its configuration could not be built")
_ATTENTION_EVERY_TENTH = (["linear_attention"] * 9 + ["full_attention"]) * 4

# what the defaults lack, as in published models
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "granitemoehybrid": {"layer_types": _ATTENTION_EVERY_TENTH, "num_hidden_layers": 40},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}


def certified(name: str) -> dict[str, Any]:
    """One type's row."""
    start = time.process_time()
    if name in CONFIGURATIONS:
        return {**row(name, *configuration(name), start), "published": True}
    try:
        config = CONFIG_MAPPING[name](**FIELDS.get(name, {}))
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception as error:  # noqa: BLE001  # whatever a class raises for its own defaults
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return {"type": name, "result": "not built", "reason": f"{NOT_BUILT[2]} from its defaults: {words}"}
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    if kind.config_class is not type(config):  # the text model of several parts
        config = config.get_text_config(decoder=True)
    if hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    return row(name, kind, config, start)


def row(name: str, kind: type[Any], config: Any, start: float) -> dict[str, Any]:
    """What its certificate says."""
    found = certify_class(kind, config, cached=False)
    result = "exact" if found.is_exact else "not built" if found.reason.startswith(NOT_BUILT) else "refused"
    return {
        "type": name,
        "class": kind.__name__,
        "result": result,
        "error": found.error,
        "reason": found.reason,
        "states": found.states,
        "head": found.head,
        "needed": needed(found) if found.is_exact else [],
        "takes": found.takes,
        "checkpoints": found.checkpoints,
        "attention": found.chunk_attention or found.attention,
        "seconds": round(time.process_time() - start, 2),
    }


def needed(found: Any) -> list[str]:
    """What a type needed beside the functional cache."""
    words = [found.mend] if found.mend else []
    if found.counts_from_chunk:
        words.append("positions, which it counts from the chunk's start")
    if found.counts_padding:
        words.append("padding kept to the right, since it counts positions by it")
    if found.head and not found.shifts_labels:
        words.append("its loss, which does not shift labels")
    return words


def in_a_child(name: str, answer: Connection) -> None:
    """Certify within limits of processor time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    answer.send(certified(name))


def certified_all(names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows as they come, each from a process of its own, a few at a time."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported there
    waiting, running = list(reversed(names)), dict[Connection, tuple[str, Any]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=in_a_child, args=(name, there))
            child.start()
            there.close()
            running[here] = (name, child)
        for here in wait(list(running)):
            name, child = running.pop(here)
            try:
                yield here.recv()
            except EOFError:
                child.join()
                out_of_time = child.exitcode == -signal.SIGXCPU
                reason = f"more than {SECONDS} seconds" if out_of_time else f"its process ended with {child.exitcode}"
                yield {"type": name, "result": "timed out" if out_of_time else "not built", "reason": reason}
            child.join()


def document(rows: list[dict[str, Any]], versions: str) -> str:
    """The page of the documentation."""
    types = [row for row in rows if not row.get("published")]
    counts = Counter(row["result"] for row in types)
    exact = [row["error"] for row in types if row["result"] == "exact"]
    summary = ", ".join(f"{counts[one]} {one}" for one in ("exact", "refused", "not built", "timed out") if counts[one])
    lines = [
        "# Hugging Face models, type by type",
        "",
        "<!-- written by python -m benchmarks.hf_table -->",
        "",
        f"{versions}. Of {len(types)} causal types in transformers' registry: {summary}; the largest error among the "
        f"exact is {max(exact, default=0):.0e}.",
        "",
        "*Exact*: every gradient within 1e-10 (relative, float64) of plain backpropagation's, over several chunks and "
        "with a remainder of one token; the model small, its code and options as they are. *Refused*: `enable` raises, "
        "with this reason. *Not built*: no small model came of the type's defaults; your own configuration may do. Any "
        "model's configuration is certified when it is enabled (see [Hugging Face models](huggingface.md)).",
        "",
        "The head is taken as `h W^T + b` (linear), through the model's own code in pieces, or whole. Seconds are of "
        "one processor.",
        "",
        "## Configurations of published models",
        "",
        *table([row for row in rows if row.get("published")]),
        "",
        "## Every causal type",
        "",
        *table(types),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Its lines."""
    lines = ["| model | state | result | head | needed, or why not | seconds |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["type"]):
        result = f"exact, {row['error']:.0e}" if row["result"] == "exact" else row["result"]
        words = "; ".join(row.get("needed", [])) or row.get("reason", "")
        cells = [
            row["type"],
            ", ".join(row.get("states", [])),
            result,
            row.get("head") or "",
            words.replace("|", "\\|"),
        ]
        lines.append("| " + " | ".join([*cells, str(row.get("seconds", ""))]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="to be certified anew; none: all that are missing")
    parser.add_argument("--anew", action="store_true", help="forget what is known")
    parser.add_argument("--jobs", type=int, default=JOBS, help="processes at a time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    path = RESULTS / "hf_table.json"
    rows = [] if given.anew or not path.exists() else json.loads(path.read_text())["rows"]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "slimgrad": slimgrad.__version__}
    known = {row["type"]: row for row in rows if row["versions"] == versions and row["type"] not in given.types}
    names = [name for name in [*CONFIGURATIONS, *dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)] if name not in known]
    if given.types:
        names = [name for name in names if name in given.types]
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    for found in certified_all(names, given.jobs):
        known[found["type"]] = {**found, "versions": versions}
        rows = sorted(known.values(), key=lambda row: row["type"])
        save("hf_table", rows)
        DOCUMENT.write_text(document(rows, words[0].upper() + words[1:]))
        print(
            f"{found['type']}: {found['result']} {found.get('error') or ''} {found.get('reason', '')[:100]}", flush=True
        )
    print(dict(Counter(row["result"] for row in known.values())))


if __name__ == "__main__":
    main()
