"""transformers' Trainer as users have it, with `enable` and without: losses step by step, and the weights after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import slimgrad.hf  # noqa: E402
from slimgrad.hf.forwards import enabled  # noqa: E402
from tests.hf.models import KINDS, VOCABULARY, large, llama, sweeps  # noqa: E402

STEPS, ACCUMULATED = 4, 3


class Documents(Dataset[dict[str, Any]]):
    """Of different lengths, so that rows are padded on the right."""

    def __init__(self, count: int = 24, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(20, 50, (count,), generator=generator).tolist()
        self.rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    def together(tensors: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": together(ids, 0),
        "labels": together([row["labels"] for row in rows], -100),
        "attention_mask": together([torch.ones_like(x) for x in ids], 0),
    }


class Generates(transformers.TrainerCallback):
    """In the middle of training, as people look at samples."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            mode = model.training
            prompt = torch.tensor([[5, 6, 7]])
            self.found.append(model.eval().generate(input_ids=prompt, max_new_tokens=8, do_sample=False))
            model.train(mode)


class Found:
    """What a run left."""

    def __init__(self, model: Any, logs: list[dict[str, Any]], samples: list[Tensor]) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.samples = samples
        self.losses = [x["loss"] for x in logs if "loss" in x]
        self.norms = [x["grad_norm"] for x in logs if "grad_norm" in x]
        self.evaluations = [x["eval_loss"] for x in logs if "eval_loss" in x]

    def differences(self, other: Found) -> dict[str, float]:
        """The largest relative ones."""

        def worst(a: list[float], b: list[float]) -> float:
            return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

        weights = [((self.weights[n] - w).norm() / w.norm()).item() for n, w in other.weights.items()]
        found = {"losses": worst(self.losses, other.losses), "weights": max(weights)}
        return found | {
            "norms": worst(self.norms, other.norms),
            "evaluations": worst(self.evaluations, other.evaluations),
        }


def trained(
    folder: Path, *, chunked: bool, kind: str = "llama", resumed: bool = False, attention: str = "sdpa", **options: Any
) -> Found:
    transformers.set_seed(0)
    model = large(llama(tie_word_embeddings=True)).float() if kind == "llama" else KINDS[kind]().train()
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    if chunked:
        slimgrad.hf.enable(model, chunk=13)
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 0.1,
        "optim": "sgd",
        "save_strategy": "no",
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_grad_norm": 1.0,
    }
    samples = Generates()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **{**given, **options}),
        train_dataset=Documents(),
        eval_dataset=Documents(4, seed=2),
        data_collator=padded,
        callbacks=[samples],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
    assert sweeps(model) == (0 if not chunked else ACCUMULATED * (STEPS - 2 * resumed))
    assert bool(enabled(model)) == chunked
    return Found(model, trainer.state.log_history, samples.found)


CASES: dict[str, dict[str, Any]] = {
    "accumulation, clipping, padding, tied weights": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "Adam with decay": {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_run(case: str, tmp_path: Path) -> None:
    expected, got = (trained(tmp_path, chunked=chunked, **CASES[case]) for chunked in (False, True))
    differences = got.differences(expected)
    print(case, differences)
    assert len(got.losses) == STEPS
    assert len(got.evaluations) == 2
    assert got.losses[0] != got.losses[-1]
    assert max(differences["losses"], differences["norms"], differences["evaluations"]) <= 1e-6  # measured 1.6e-7
    # Adam divides by a gradient's own size, whatever that is
    assert differences["weights"] <= (2e-5 if "Adam" in case else 1e-6)  # measured 1.9e-6, 3.4e-8
    assert torch.equal(got.samples[0], expected.samples[0])


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    expected, got = (trained(tmp_path, chunked=chunked, kind=kind) for chunked in (False, True))
    differences = got.differences(expected)
    print(kind, differences)
    assert max(differences.values()) <= 5e-6  # measured MEASURED


def test_bfloat16(tmp_path: Path) -> None:
    """No further from plain training than plain training with another attention is."""
    plain, other = (trained(tmp_path, chunked=False, bf16=True, attention=name) for name in ("sdpa", "eager"))
    exact = trained(tmp_path, chunked=False)
    got = trained(tmp_path, chunked=True, bf16=True)
    noise = {name: max(value, plain.differences(exact)[name]) for name, value in other.differences(plain).items()}
    differences = got.differences(plain)
    print("bfloat16", differences, "noise", noise)
    assert all(differences[name] <= 2 * noise[name] for name in noise), differences


def test_resumed_in_the_middle(tmp_path: Path) -> None:
    """Bit for bit the run that was not interrupted."""
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = trained(tmp_path, chunked=True, **options)
    resumed = trained(tmp_path, chunked=True, resumed=True, **options)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.weights[name], w) for name, w in whole.weights.items())


def test_begun_without_and_resumed_with(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    plain = trained(tmp_path, chunked=False, **options)
    differences = trained(tmp_path, chunked=True, resumed=True, **options).differences(plain)
    print("resumed", differences)
    assert max(differences.values()) <= 1e-6  # measured 6.7e-8
