"""A Hugging Face model's gradient: memory and time over length, plain, checkpointed per layer, in chunks, and both.

    python -m benchmarks.huggingface                    # an hour on one core; writes results/huggingface.json, goes on
    python -m benchmarks.huggingface --device cuda      # minutes; writes results/huggingface-cuda.json

Shapes of published models with random weights; the loss is that of `model(input_ids, labels=input_ids)`. Each row is
a process of its own. Memory is the peak above the loaded model and its gradients, from a step that begins without any
(`zero_grad(set_to_none=True)`, torch's default): resident bytes on the CPU (blocks of 1 MiB and more returned when
freed), on CUDA what torch's allocator gave out. Time is that of the same gradient (on CUDA of a further one), after a
short one: CPU seconds of one thread, what returning blocks costs included; on CUDA wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.measure import RESULTS, save
from slimgrad.budget.measure import MALLOC, measure_peak
from slimgrad.paper.machine import describe_machine

METHODS = ("plain", "checkpointing", "ours", "ours+checkpointing")
QWEN3 = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151_936, "max_position_embeddings": 1 << 20}
MAMBA2: dict[str, Any] = {
    "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2, "chunk_size": 64, "vocab_size": 32_000,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-100M": (
        "Llama",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "intermediate_size": 2048,
            "vocab_size": 32_000,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1 << 20,
        },
    ),
    "llama-5M": (
        "Llama",
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 704,
            "vocab_size": 8000,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1 << 20,
        },
    ),
    "mamba2-4M": ("Mamba2", {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 8, **MAMBA2, "vocab_size": 8000}),
    "mamba2-100M": ("Mamba2", {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, **MAMBA2}),
    "mamba2-20M": ("Mamba2", {"hidden_size": 384, "num_hidden_layers": 6, "num_heads": 12, **MAMBA2}),
    "qwen3.5-100M": (
        "Qwen3_5",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "linear_num_key_heads": 6,
            "linear_num_value_heads": 12,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "intermediate_size": 2048,
            "vocab_size": 32_000,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1 << 20,
        },
    ),
    "qwen3-0.6B": (
        "Qwen3",
        {
            **QWEN3,
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 3072,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4B": (
        "Qwen3",
        {
            **QWEN3,
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 9728,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8B": (
        "Qwen3",
        {
            **QWEN3,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 12_288,
            "tie_word_embeddings": False,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One gradient.

    Attributes:
        shape: a name of `SHAPES`.
        method: one of `METHODS`.
        length, chunk: tokens.
        vocabulary: words; 0: the shape's own.
        lora: rank of adapters on all linear layers, the rest frozen; 0: everything is trained.
        rows: where keys and values are kept.
        repeats: gradients that are timed.
        device: "cpu" (float32) or "cuda" (bfloat16).
    """

    shape: str
    method: str
    length: int
    chunk: int = 512
    vocabulary: int = 0
    lora: int = 0
    rows: str = "device"
    repeats: int = 3
    device: str = "cpu"

    def build(self) -> Any:
        """The model, ready to train."""
        import transformers

        name, sizes = SHAPES[self.shape]
        sizes = {**sizes, **({"vocab_size": self.vocabulary} if self.vocabulary else {})}
        text = "Text" if name == "Qwen3_5" else ""
        config = getattr(transformers, f"{name}{text}Config")(**sizes, use_cache=False)
        torch.set_default_dtype(torch.float32 if self.device == "cpu" else torch.bfloat16)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = getattr(transformers, f"{name}ForCausalLM")(config).train()
        if self.lora:
            import peft

            adapters = peft.LoraConfig(r=self.lora, target_modules="all-linear")
            model = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False)
        if self.method.endswith("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.lora:
                model.enable_input_require_grads()
        return model

    def gradient(self, model: Any, tokens: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()


def measure(case: Case) -> dict[str, Any]:
    """In the child: the row."""
    import slimgrad as sg

    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    model = case.build()
    tokens = torch.randint(0, 1000, (1, case.length), device=case.device)
    parameters = sum(p.numel() for p in model.parameters())
    if case.method.startswith("ours"):
        schedule = None if case.rows == "device" else sg.Rebuild(rows=case.rows)
        sg.hf.enable(model, chunk=case.chunk, schedule=schedule)
    case.gradient(model, tokens[:, : min(case.length, 2 * case.chunk)])  # what is looked up once: kernels, caches
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    clock = time.process_time if case.device == "cpu" else time.perf_counter
    began = clock()
    first = measure_peak(lambda: case.gradient(model, tokens), case.device)
    row: dict[str, Any] = {"parameters": parameters, "gradient_bytes": gradients, "first_seconds": clock() - began}
    row["peak_bytes_above"] = None if first.peak_bytes is None else first.peak_bytes - gradients
    if case.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    seconds: list[float] = []
    for _ in range(case.repeats):
        began = clock()
        case.gradient(model, tokens)
        if case.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    if seconds:
        row["seconds"], row["all_seconds"] = statistics.median(seconds), seconds
    return row


def in_child(case: Case, limit_s: float, malloc: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.huggingface", "--child", json.dumps(asdict(case))]
    environment = {**os.environ, **MALLOC[malloc], "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"over {limit_s:.0f} s"}
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": words[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def cpu_cases() -> list[Case]:
    """The longest first, since each says most by itself."""
    sizes: list[dict[str, Any]] = [
        {"shape": "llama-100M", "length": 8192},
        {"shape": "llama-100M", "length": 2048},
        {"shape": "llama-100M", "length": 2048, "vocabulary": 128_256},
        {"shape": "mamba2-100M", "length": 2048},
        {"shape": "mamba2-100M", "length": 1024},
        {"shape": "qwen3.5-100M", "length": 2048},
        {"shape": "qwen3.5-100M", "length": 1024},
    ]
    cases = [Case(method=method, repeats=0, **size) for size in sizes for method in METHODS]
    # beyond what the others have memory for; and of a state that does not grow, two lengths (in less than an hour, so
    # that it is a smaller model)
    cases += [Case(shape="llama-100M", method=m, length=16_384, repeats=0) for m in ("ours", "ours+checkpointing")]
    cases.append(Case(shape="mamba2-100M", method="ours", length=8192, repeats=0))
    return [*cases, *(Case(shape="mamba2-20M", method="ours", length=n, repeats=0) for n in (8192, 65_536))]


def cuda_cases() -> list[Case]:
    return [Case(shape="qwen3-0.6B", method=m, length=16_384, chunk=4096, device="cuda", repeats=2) for m in METHODS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--child")
    parser.add_argument("--case", action="append", help="one more case, as JSON", default=[])
    parser.add_argument("--only", action="store_true", help="the cases of --case alone")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for one row")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Case(**json.loads(options.child)))))
        return
    usual = cpu_cases() if options.device == "cpu" else cuda_cases()
    cases = ([] if options.only else usual) + [Case(**json.loads(text)) for text in options.case]
    name = "huggingface" if options.device == "cpu" else "huggingface-cuda"
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for case in cases:
        same = [row for row in rows if all(row.get(k) == v for k, v in asdict(case).items())]
        if any("failed" not in row for row in same):
            continue
        rows = [row for row in rows if row not in same]  # what failed is tried again
        row = asdict(case)
        row |= in_child(case, options.limit, "returned" if case.device == "cpu" else "default")
        row["machine"] = describe_machine()
        rows.append(row)
        print({k: v for k, v in row.items() if k != "machine"}, flush=True)
        save(name, rows)


if __name__ == "__main__":
    main()
