"""TRL's trainers as users have them: they score tokens themselves, on the hidden states of the model's base."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

import slimgrad.hf  # noqa: E402
from tests.hf.models import hybrid, large, llama, sweeps  # noqa: E402

STEPS, ACCUMULATED = 3, 2
WORDS = [f"w{i}" for i in range(80)]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s> "
    "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    special = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT, **names)


def rows(kind: str, count: int = 12) -> Any:
    drawn = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(least, most)))

    made: dict[str, Any] = {
        "text": lambda: {"text": text(20, 50)},
        "completion": lambda: {"prompt": text(5, 20), "completion": text(10, 30)},
        "messages": lambda: {
            "messages": [{"role": r, "content": text(4, 16)} for _ in range(2) for r in ("user", "assistant")]
        },
        "pairs": lambda: {"prompt": text(5, 20), "chosen": text(10, 30), "rejected": text(10, 30)},
    }
    return datasets.Dataset.from_list([made[kind]() for _ in range(count)])


Trained = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


def trained(
    folder: Path,
    trainer: str,
    *,
    enabled: str | None,
    data: str,
    lora: bool = False,
    kind: Any = llama,
    **options: Any,
) -> Trained:
    """The log of every step, and the weights after the last; `enabled` before or after the trainer was made, or not."""
    transformers.set_seed(0)
    model = large(kind(tie_word_embeddings=True)).float()
    if enabled == "before":
        slimgrad.hf.enable(model, chunk=13)
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 0.1,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
    }
    config = {"SFTTrainer": trl.SFTConfig, "DPOTrainer": trl.DPOConfig}[trainer](str(folder), **{**given, **options})
    arguments: dict[str, Any] = {"train_dataset": rows(data), "processing_class": tokenizer(), "args": config}
    if lora:
        arguments["peft_config"] = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    elif trainer == "DPOTrainer":
        arguments["ref_model"] = copy.deepcopy(model)  # of an enabled model too
    made = getattr(trl, trainer)(model=model, **arguments)
    made.remove_callback(transformers.PrinterCallback)
    if enabled == "after":
        slimgrad.hf.enable(made.model, chunk=13)
    made.train()
    if enabled is not None:
        assert sweeps(made.model) >= ACCUMULATED * STEPS
    logs = [x for x in made.state.log_history if "loss" in x]
    assert len(logs) == STEPS
    return logs, {name: p.detach().clone() for name, p in made.model.named_parameters()}


def differences(got: Trained, expected: Trained) -> dict[str, float]:
    """The largest of what is logged, relative; of the weights, relative."""
    found: dict[str, float] = {}
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "logps/chosen", "logps/rejected"):
        pairs = [(a[name], b[name]) for a, b in zip(got[0], expected[0], strict=True) if name in b]
        if pairs:
            found[name] = max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)
    weights = [((got[1][n] - w).norm() / w.norm()).item() for n, w in expected[1].items()]
    return found | {"weights": max(weights)}


SFT: dict[str, dict[str, Any]] = {
    "as it comes": {"data": "text"},
    "completions alone": {"data": "completion"},
    "assistant's turns alone": {"data": "messages", "assistant_only_loss": True},
    "lora": {"data": "text", "lora": True},
    "packing": {"data": "text", "packing": True},
    "padding-free": {"data": "text", "padding_free": True, "max_length": None},
    "padding-free, to a multiple": {"data": "text", "padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "dft": {"data": "text", "loss_type": "dft"},
}


@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning", "ignore:.*flash.*:UserWarning")
@pytest.mark.parametrize("case", SFT)
def test_sft(case: str, tmp_path: Path) -> None:
    expected = trained(tmp_path, "SFTTrainer", enabled=None, **SFT[case])
    for when in ("before", "after") if case in ("as it comes", "lora") else ("before",):
        found = differences(trained(tmp_path, "SFTTrainer", enabled=when, **SFT[case]), expected)
        print(case, when, found)
        assert {"loss", "grad_norm", "entropy", "mean_token_accuracy"} <= found.keys()
        assert max(found.values()) <= 5e-6, (when, found)  # measured 8.7e-7


@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning", "ignore:.*flash.*:UserWarning")
def test_sft_of_a_hybrid_without_padding(tmp_path: Path) -> None:
    """Plain transformers mixes documents in a recurrence unless its kernels are there; each alone is what we train."""
    given = {"data": "text", "kind": hybrid, "max_length": None}
    alone = trained(tmp_path, "SFTTrainer", enabled=None, **given)  # padded on the right
    found = differences(trained(tmp_path, "SFTTrainer", enabled="before", padding_free=True, **given), alone)
    print(found)
    assert max(found.values()) <= 2e-5, found  # measured 5.6e-6


@pytest.mark.parametrize("lora", [False, True])
def test_dpo(lora: bool, tmp_path: Path) -> None:
    expected = trained(tmp_path, "DPOTrainer", enabled=None, data="pairs", lora=lora)
    for when in ("before", "after"):
        found = differences(trained(tmp_path, "DPOTrainer", enabled=when, data="pairs", lora=lora), expected)
        print(lora, when, found)
        assert {"loss", "grad_norm", "logps/chosen"} <= found.keys()
        assert max(found.values()) <= 5e-6, (when, found)  # measured 1.2e-6
