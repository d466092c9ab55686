"""transformers' Trainer for documents of any length: evaluation in chunks, per token; nothing else is changed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from slimgrad.budget.process import peak_resident_bytes
from slimgrad.errors import RunError
from slimgrad.hf.forwards import evaluated_in_chunks
from slimgrad.hf.head import IGNORED
from slimgrad.hf.tuning.settings import Settings
from slimgrad.runs.stopping import Interrupted, Stop

KEPT = 2  # checkpoints: one may be half written when a process is killed
_SAVES = 10


class Padded:
    """Documents as a batch, padded on the right.

    Args:
        pad: the token that fills; never read.
        shifts_labels: whether the model's own loss takes the next token's label, or wants it in place.
    """

    def __init__(self, pad: int, *, shifts_labels: bool) -> None:
        self.pad, self.shifts_labels = pad, shifts_labels

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def batch(name: str, fill: int) -> Tensor:
            return torch.stack([F.pad(row[name], (0, longest - len(row[name])), value=fill) for row in rows])

        labels = batch("labels", IGNORED)
        if not self.shifts_labels:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mask = [torch.arange(longest) < len(row["input_ids"]) for row in rows]
        return {
            "input_ids": batch("input_ids", self.pad), "labels": labels, "attention_mask": torch.stack(mask).long(),
        }  # fmt: skip


class ChunkedTrainer(transformers.Trainer):
    """The Trainer of an enabled model; evaluation takes one document at a time, and gives the loss per token."""

    def __init__(self, *, shifts_labels: bool, **options: Any) -> None:
        super().__init__(compute_metrics=_per_token, **options)
        self._first = 1 if shifts_labels else 0

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss and the number of its tokens, where the Trainer expects logits and labels."""
        inputs = cast("dict[str, Any]", self._prepare_inputs(inputs))
        with torch.no_grad(), evaluated_in_chunks(cast(nn.Module, self.model)), self.compute_loss_context_manager():
            loss = model(**inputs).loss
        count = (inputs["labels"][:, self._first :] != IGNORED).sum()
        return None, loss.double()[None], count[None]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the peak of memory; a loss that is no number ends the run."""
        peak = peak_bytes(self.args.device)
        if "loss" in logs and not math.isfinite(logs["loss"]):
            raise RunError(
                f"the loss is {logs['loss']} at step {self.state.global_step}. The checkpoint before it is whole: go "
                "on from another learning rate in a new run"
            )
        super().log(logs if peak is None else {**logs, "peak_memory_mb": round(peak / 1e6)}, start_time)


def _per_token(found: Any) -> dict[str, float]:
    losses, counts = np.asarray(found.predictions), np.asarray(found.label_ids)
    loss = float((losses * counts).sum() / counts.sum())
    return {"loss": loss, "perplexity": float(np.exp(loss)), "tokens": int(counts.sum())}


class SavesWhenAsked(transformers.TrainerCallback):
    """After Ctrl-C or SIGTERM the step is finished and saved, and training ends."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look whether a signal has come."""
        try:
            self.stop.check()
        except Interrupted:
            control.should_save = control.should_training_stop = True


def arguments(settings: Settings, folder: Path, *, steps: int, dtype: torch.dtype) -> transformers.TrainingArguments:
    """The Trainer's own arguments for a run of `steps` steps."""
    inside: dict[str, Any] = {}
    if settings.gradient_checkpointing:  # the argument was renamed in the course of transformers 5
        known = hasattr(transformers.TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if known else "gradient_checkpointing"
        inside = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return transformers.TrainingArguments(
        output_dir=str(folder),
        run_name=folder.name,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=steps,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * steps),
        optim="adamw_torch",
        seed=settings.seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available() and settings.device != "cpu",
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings.log,
        disable_tqdm=True,
        save_steps=settings.save_every or math.ceil(steps / _SAVES),
        save_strategy="steps",
        save_total_limit=KEPT,
        **inside,
    )


def num_steps(settings: Settings, documents: int) -> int:
    """Steps of the optimiser in all."""
    if settings.steps is not None:
        return settings.steps
    each = math.ceil(math.ceil(documents / settings.batch) / settings.accumulate)
    return math.ceil((settings.epochs or 1) * each)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held so far: of the GPU's, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
