"""From settings to a fine-tuned model: everything is checked first, then trained, evaluated and saved."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from torch import nn

import slimgrad
from slimgrad.errors import InputError, MemoryLimitError
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.certifying import certify
from slimgrad.hf.enabling import enable
from slimgrad.hf.tuning.folder import Folder
from slimgrad.hf.tuning.loading import Source, require_extras, with_adapters
from slimgrad.hf.tuning.settings import Settings, as_given
from slimgrad.hf.tuning.tokens import Encoder, read_tokens, write_tokens
from slimgrad.hf.tuning.trainer import KEPT, ChunkedTrainer, Padded, SavesWhenAsked, arguments, num_steps, peak_bytes
from slimgrad.runs.stopping import Interrupted, Stop
from slimgrad.sweep.allocation import is_allocation_failure

Say = Callable[[str, str], None]  # what it is about; the words
_MOMENTS = 8  # bytes of the optimiser per trained number


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a run.

    Attributes:
        path: its folder, which transformers (or PEFT) loads.
        is_adapter: whether it holds an adapter, or a whole model.
        before, after: loss per token, perplexity and tokens of the evaluation; None without one.
        steps: of the optimiser.
        seconds: in all, of this process.
        peak_bytes: the most memory held; None where the system does not tell.
    """

    path: Path
    is_adapter: bool
    before: dict[str, float] | None
    after: dict[str, float] | None
    steps: int
    seconds: float
    peak_bytes: int | None

    def how_to_load(self) -> list[str]:
        """Two lines of Python that load it, without slimgrad."""
        package, kind = ("peft", "AutoPeftModelForCausalLM") if self.is_adapter else ("transformers", "")
        kind = kind or "AutoModelForCausalLM"
        return [f"from {package} import {kind}", f"model = {kind}.from_pretrained({str(self.path)!r})"]


def finetune(
    settings: Settings,
    *,
    out: Path | None = None,
    say: Say = lambda name, words: None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Tuned:
    """Fine-tune a Hugging Face model on whole documents, with transformers' Trainer and exact gradients in chunks.

    Args:
        settings: of the run.
        out: a new or empty folder; None: runs/MODEL-DATE-TIME.
        say: is told what was found and chosen, as it becomes known.
        callbacks: of the Trainer, beside its own.

    Raises:
        InputError: something given does not fit; said before anything is trained.
        ModelError: the model is not exact in chunks.
    """
    settings = replace(
        settings, model=as_given(settings.model), data=as_given(settings.data),
        eval=settings.eval and as_given(settings.eval),
    )  # fmt: skip
    work = _Work.prepared(settings, say)
    with Folder.create(out, Path(settings.model).name) as folder:
        _keep_documents(work, folder)
        versions = {p.__name__: p.__version__ for p in (slimgrad, torch, transformers)}
        folder.record |= {"settings": settings.to_dict(), "versions": versions, "certificate": str(work.certificate)}
        folder.save_record()
        return work.carried_out(folder, callbacks)


def resume(
    path: Path,
    given: dict[str, Any] | None = None,
    *,
    say: Say = lambda name, words: None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Tuned:
    """Go on with a run from its last checkpoint.

    Args:
        path: its folder.
        given: settings, of which those that say how a gradient is computed may differ from the run's.
        say, callbacks: as for `finetune`.

    Raises:
        InputError: there is no such run, it is finished, or it would become another one.
    """
    with Folder.reopen(path) as folder:
        given = {name: as_given(x) if name in ("model", "data", "eval") else x for name, x in (given or {}).items()}
        settings = Settings.from_dict(folder.record["settings"]).going_on(given)
        return _Work.prepared(settings, say).carried_out(folder, callbacks)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A run whose model was looked at."""

    settings: Settings
    source: Source
    certificate: Certificate
    tokenizer: Any
    say: Say

    @classmethod
    def prepared(cls, settings: Settings, say: Say) -> _Work:
        require_extras(settings)
        _refuse_devices(settings)
        source = Source.open(settings.model)
        certificate = certify(source.blank)
        certificate.require_exact()
        numbers = sum(p.numel() for p in source.blank.parameters())
        say("model", f"{settings.model}: {type(source.blank).__name__}, {numbers / 1e6:,.2f} million parameters")
        say("certificate", str(certificate))
        tokenizer = source.tokenizer()
        return cls(settings=settings, source=source, certificate=certificate, tokenizer=tokenizer, say=say)

    def carried_out(self, folder: Folder, callbacks: Sequence[transformers.TrainerCallback]) -> Tuned:
        """Load, train, evaluate, save."""
        began, settings = time.perf_counter(), self.settings
        training, evaluation = _documents(settings, folder)
        checkpoint = folder.last_checkpoint()
        model = self._model(folder)
        steps = num_steps(settings, len(training))
        self._describe(folder, model, steps, checkpoint)
        stop = Stop()
        trainer = self._trainer(model, folder, training, evaluation, steps, [SavesWhenAsked(stop), *callbacks])
        with stop.listening(), _out_of_memory(settings):
            if evaluation is not None and "before" not in folder.record:
                folder.record["before"] = _evaluated(trainer)
                folder.save_record()
            if evaluation is not None:
                self.say("before", _words(folder.record["before"]))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            _stop_where_asked(stop, trainer, folder)
            after = None if evaluation is None else _evaluated(trainer)
        if after is not None:
            self.say("after", _words(after))
        trainer.save_model(str(folder.path))
        trainer.save_state()
        folder.record["after"] = after
        folder.save_record()
        return Tuned(
            path=folder.path, is_adapter=settings.lora is not None, before=folder.record.get("before"), after=after,
            steps=trainer.state.global_step, seconds=time.perf_counter() - began,
            peak_bytes=peak_bytes(trainer.args.device),
        )  # fmt: skip

    def _model(self, folder: Folder) -> nn.Module:
        """Loaded, with its adapters, and enabled, which looks at it on a few tokens."""
        settings = self.settings
        inner = self.source.weights(settings)
        transformers.set_seed(settings.seed)
        model = with_adapters(inner, settings)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saved = 4 * trained if settings.lora else sum(p.numel() * p.element_size() for p in model.parameters())
        folder.require_space((KEPT + 1) * (saved + _MOMENTS * trained) + saved, "checkpoints and the result")
        how: dict[str, Any] = {"chunk": settings.chunk, "memory": settings.memory}
        enable(model, **how, schedule=settings.made_schedule(), certificate=self.certificate)
        self.say("smoke check", "on its own weights, whole and in chunks: the same hidden states up to rounding")
        return model

    def _describe(self, folder: Folder, model: nn.Module, steps: int, checkpoint: Path | None) -> None:
        settings, record = self.settings, folder.record
        for name in ("data", "evaluation", "warning"):
            if name in record:
                self.say(name, record[name])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kind = "every weight"
        if settings.lora:
            kind = f"{'DoRA' if settings.dora else 'LoRA'} of rank {settings.lora}, alpha {settings.alpha}"
            kind += ", on weights of 4 bits" if settings.bits else ""
        dtype = str(self.source.dtype(settings))[6:]
        device = next(model.parameters()).device.type
        self.say("training", f"{kind}: {trained:,} numbers, {dtype} on {device}")
        inside = ", activations checkpointed inside it" if settings.gradient_checkpointing else ""
        chunk = (
            f"as {settings.memory or 'what is free'} allows" if settings.chunk is None else f"{settings.chunk:,} tokens"
        )
        self.say("chunk", f"{chunk}: only one chunk's graph lives at once{inside}")
        self.say("schedule", f"{settings.schedule}; keys and values on the {settings.rows}")
        together = settings.batch * settings.accumulate
        each = "1 document each" if together == 1 else f"{together} documents each"
        self.say("steps", f"{steps:,}, {each}; AdamW, learning rate {settings.rate:g}, seed {settings.seed}")
        if checkpoint is not None:
            self.say("resumed", f"after {checkpoint.name.replace('-', ' ')}")
        self.say("results", str(folder.path))

    def _trainer(
        self, model: nn.Module, folder: Folder, training: datasets.Dataset, evaluation: datasets.Dataset | None,
        steps: int, callbacks: list[transformers.TrainerCallback],
    ) -> ChunkedTrainer:  # fmt: skip
        pad = getattr(self.tokenizer, "pad_token_id", None)
        trainer = ChunkedTrainer(
            shifts_labels=self.certificate.shifts_labels,
            model=model,
            args=arguments(self.settings, folder.path, steps=steps, dtype=self.source.dtype(self.settings)),
            train_dataset=training,
            eval_dataset=evaluation,
            data_collator=Padded(pad or 0, shifts_labels=self.certificate.shifts_labels),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer


def _refuse_devices(settings: Settings) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("slimgrad finetune runs in one process; expected it without torchrun. For several, use enable")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: expected a GPU that torch can use, found none. Leave it out to use the CPU")
    if torch.cuda.device_count() > 1 and settings.device != "cpu":
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible, of which this command uses one. Set CUDA_VISIBLE_DEVICES=0"
        )


def _keep_documents(work: _Work, folder: Folder) -> None:
    """Write the documents into the run's folder, and what was found into its record."""
    settings, source, record = work.settings, work.source, folder.record
    encoder = Encoder(work.tokenizer, vocabulary=source.vocabulary, positions=source.learned_positions)
    counted = write_tokens(Path(settings.data), encoder, folder.train_file)
    record["data"], longest, where = f"{settings.data}: {counted}", counted.longest, counted.where
    if settings.eval is not None:
        held = write_tokens(Path(settings.eval), encoder, folder.eval_file)
        record["evaluation"] = f"{settings.eval}: {held}"
        if held.longest > longest:
            longest, where = held.longest, held.where
    elif settings.eval_share is not None:
        if counted.documents < 2:
            raise InputError(
                f"--eval-share {settings.eval_share}: expected several documents, found one; name --eval FILE"
            )
        held_out = _held_out(settings, counted.documents)
        record["evaluation"] = f"{held_out:,} of them, drawn by the seed and not trained on"
    trained = source.trained_positions
    if trained is not None and longest > trained:
        record["warning"] = (
            f"the longest document ({where}) has {longest:,} tokens, and the model was made for {trained:,}: it has to "
            "learn longer distances"
        )


def _held_out(settings: Settings, documents: int) -> int:
    return min(documents - 1, max(1, round((settings.eval_share or 0) * documents)))


def _documents(settings: Settings, folder: Folder) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Those to train on, and those to evaluate on."""
    training = read_tokens(folder.train_file)
    if folder.eval_file.exists():
        return training, read_tokens(folder.eval_file)
    if settings.eval_share is None:
        return training, None
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held_out = _held_out(settings, len(training))
    kept, held = (training.select(sorted(part), keep_in_memory=True) for part in (order[held_out:], order[:held_out]))
    return kept, held


def _evaluated(trainer: ChunkedTrainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in ("loss", "perplexity", "tokens")}


def _words(found: dict[str, float]) -> str:
    return (
        f"loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:,.2f}, "
        f"over {cast(int, found['tokens']):,} tokens"
    )


def _stop_where_asked(stop: Stop, trainer: ChunkedTrainer, folder: Folder) -> None:
    try:
        stop.check()
    except Interrupted as interrupted:
        step = trainer.state.global_step
        interrupted.add_note(f"saved after step {step:,}. Go on: slimgrad finetune --resume {folder.path}")
        raise


@contextmanager
def _out_of_memory(settings: Settings) -> Generator[None]:
    """Turn a refused allocation within the block into one message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        raise MemoryLimitError(
            "memory ran out. A smaller --chunk or --memory needs less; so do --gradient-checkpointing, --rows host (on "
            "a GPU) and --lora with --bits 4"
        ) from error
