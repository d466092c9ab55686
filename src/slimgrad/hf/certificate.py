"""What is known of a class: whether it is exact in chunks, and how it has to be run there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from slimgrad.errors import InputError, ModelError

TOLERANCE = 1e-10  # relative, per gradient, in float64
LENGTH = 33  # tokens
CHUNKS = (8, 7, 5, 13)  # above, at and below a window of 7; 8 leaves one token


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was found of one class, with one configuration.

    Attributes:
        model: the class and its model type.
        is_exact: every gradient within 1e-10 of plain backpropagation's, over all chunks.
        error: the largest relative error found; None where nothing could be compared.
        reason: why not, in words; empty if exact.
        base: the path of the module that is handed the cache.
        head: how the loss of the head is taken: "linear", "pieces", "whole", or None without a head.
        shifts_labels: whether the model's own loss predicts the next token from labels (or the label in place).
        counts_from_chunk: the model counts positions from the start of what it is given.
        counts_padding: whether the padding token moves the positions of what comes after it.
        takes: inputs per token that give the same outputs in chunks as in a whole pass.
        starts_anywhere: whether positions that are given may begin at another one than 0.
        silent_zeros: kinds of tokens that change nothing where they are all zero.
        checkpoints: whether transformers' own activation checkpointing within chunks gives the same gradients.
        states: the kinds of state found.
        mend: what of its code is mended while it runs in chunks (`slimgrad.hf.mends`); empty: nothing.
        attention: the attention implementation of the whole pass that it was compared with.
        chunk_attention: that of chunks, where it is another (`slimgrad.hf.attention`); None: the same.
        versions: of transformers, torch, slimgrad.
    """

    model: str
    is_exact: bool = False
    error: float | None = None
    reason: str = ""
    base: str = ""
    head: str | None = None
    shifts_labels: bool = True
    counts_from_chunk: bool = False
    counts_padding: bool = False
    takes: list[str] = field(default_factory=list[str])
    starts_anywhere: bool = False
    silent_zeros: list[str] = field(default_factory=list[str])
    checkpoints: bool = False
    states: list[str] = field(default_factory=list[str])
    mend: str = ""
    attention: str = ""
    chunk_attention: str | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])

    def require_exact(self) -> None:
        """Raise if it says no.

        Raises:
            ModelError: with the reason.
        """
        if not self.is_exact:
            raise ModelError(
                f"{self.model} is not certified as exact in chunks: {self.reason}. Expected a class whose gradients in "
                "chunks equal plain backpropagation's. Train it without slimgrad, or see docs/huggingface.md for what "
                "a class can be given"
            )

    def require_taken(self, base: nn.Module, names: Collection[str]) -> None:
        """Raise if the class is exact, but not with this.

        Args:
            base: whose layers may be set to activation checkpointing.
            names: of the inputs per token that it is given.

        Raises:
            InputError: an input that chunks do not use as a whole pass does.
            ModelError: activation checkpointing that is not exact within chunks.
        """
        for name in names:
            if name not in self.takes:
                raise InputError(
                    f"{self.model} was given {name}, with which chunks would give other outputs than a whole pass; "
                    f"expected {', '.join(self.takes)} alone. Leave it out, or slimgrad.hf.disable(model)"
                )
        if not self.checkpoints and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            raise ModelError(
                f"{self.model}: its activation checkpointing is not exact within chunks. Expected none: "
                "model.gradient_checkpointing_disable(), gradient_checkpointing=False"
            )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        kinds = ", ".join(self.states) or "none"
        if not self.is_exact:
            return f"{self.model}: NOT exact in chunks: {self.reason}\n  {versions}"
        return (
            f"{self.model}: exact in chunks\n"
            f"  largest relative error of a gradient against plain backpropagation, float64: {self.error:.1e} "
            f"(allowed {TOLERANCE:.0e})\n"
            f"  compared: {LENGTH} tokens in chunks of {', '.join(map(str, CHUNKS))}, attention: {self.attention}, "
            f"within chunks {self.chunk_attention or self.attention}\n"
            f"  state: {kinds}; head: {self.head or 'none'}; mended: {self.mend or 'nothing'}\n  {versions}"
        )
