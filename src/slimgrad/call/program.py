"""A model and one sequence as a program of chunks: what the sweep runs.

Here the chunks are read, run with the head that the call wants, and what comes of them is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from slimgrad.call.additive import SumCheck, tensors_within
from slimgrad.call.model import SharedModel
from slimgrad.call.source import SequenceData
from slimgrad.errors import InputError, ModelError
from slimgrad.states.base import Root
from slimgrad.states.tensors import version
from slimgrad.sweep import tree
from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.program import ChunkResult, Piece
from slimgrad.sweep.random import derive_seed, generators

LossFn = Callable[[Any, Any], "Tensor | dict[str, Tensor]"]


class Collected:
    """What adds up over the chunks of one sequence, or fills up along it.

    Attributes:
        loss_sum: in float64 where the device has it.
        loss_dtype: of the chunks' own losses.
        metrics: further sums, by name.
        along: tensors `[batch, time, ...]`: losses by token, or the model's outputs.
        differentiable: which of these have a graph.
        input_grads: of the inputs' leaves; None where none is wanted.
        num_targets: counted so far, in tokens up to `counted_to`.
    """

    def __init__(self, device: torch.device, input_grads: list[Tensor | None]) -> None:
        self.loss_sum = torch.zeros((), dtype=sum_dtype(device), device=device)
        self.loss_dtype = torch.float32
        self.metrics: dict[str, Tensor] = {}
        self.along: list[Tensor] = []
        self.differentiable: list[bool] = []
        self.input_grads = input_grads
        self.num_targets = torch.zeros((), dtype=torch.int64, device=device)
        self.counted_to = 0

    def add_loss(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Add one chunk's."""
        self.loss_dtype = loss.dtype
        self.loss_sum += loss.detach()
        for name, value in metrics.items():
            if name in self.metrics and self.metrics[name].shape != value.shape:
                raise InputError(
                    f"loss_fn returned the metric {name!r} in another shape than before: {list(value.shape)} after "
                    f"{list(self.metrics[name].shape)}; expected sums over the chunk, which add up over the chunks"
                )
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def write(self, outputs: Sequence[Tensor], span: Span, time: int) -> None:
        """Put one chunk's outputs in their place along time."""
        if not self.along:
            self.along = [x.new_empty((x.shape[0], time, *x.shape[2:]), requires_grad=False) for x in outputs]
            self.differentiable = [False] * len(outputs)
        for i, (whole, x) in enumerate(zip(self.along, outputs, strict=True)):
            if whole.dtype != x.dtype or whole.shape[2:] != x.shape[2:]:
                raise ModelError(
                    f"output {i} came as {x.dtype} {list(x.shape)} in {span}, after "
                    f"{whole.dtype} {[whole.shape[0], -1, *whole.shape[2:]]}; expected the same in every chunk"
                )
            whole[:, span.start : span.stop] = x.detach()
            self.differentiable[i] = self.differentiable[i] or x.requires_grad

    def state(self) -> dict[str, Any]:
        """Everything, for a file."""
        return dict(vars(self))

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self).update(state)


class ChunkProgram:
    """One sequence in chunks: a `sweep.program.Program`.

    Args:
        shared: the model and what goes with it.
        data: the inputs and targets.
        chunk: tokens per chunk.
        seed: chunks draw from seeds derived from it and from where they begin.
        loss_fn: (outputs, targets) -> the chunk's summed loss, or a dict with "loss" and additive metrics. With
            `per_token`: -> `[batch, time]`. None: the outputs themselves are wanted.
        per_token: keep every token's loss instead of adding them up.
        collect_in: the sweep in which losses are noted, "forward" or "reverse".
        sums: what is known of whether the loss adds up.

    Attributes:
        compares_targets: whether targets are read in both sweeps, also where only one of them needs them.
        takes_nothing: nothing that the caller gave requires a gradient; what comes of it may not either.
    """

    def __init__(
        self,
        shared: SharedModel,
        data: SequenceData,
        *,
        chunk: int,
        seed: int,
        loss_fn: LossFn | None,
        per_token: bool = False,
        collect_in: str = "forward",
        sums: SumCheck,
    ) -> None:
        self.shared, self.data, self.seed, self._sums = shared, data, seed, sums
        self.batch, self.time, self.device = data.batch, data.time, shared.device
        self.cut = Cut(data.time, chunk)
        self._loss_fn, self._per_token, self._collect_in = loss_fn, per_token, collect_in
        self._counts = loss_fn is not None and data.targets is not None and data.targets.whole is None
        self.compares_targets = self._counts or collect_in == "forward"
        self.takes_nothing = False
        self._spec: tree.TreeSpec | None = None  # of the outputs
        wanted = set(data.inputs.grad_positions) if shared.gather is not None else set[int]()
        leaves = [] if data.inputs.whole is None else data.inputs.flatten(data.inputs.whole)
        grads = [torch.zeros_like(x) if i in wanted else None for i, x in enumerate(leaves)]
        self.collected = Collected(shared.device, grads)

    @property
    def input_grads(self) -> tree.Tree:
        """The inputs' gradients in their tree; None where none is wanted."""
        grads = self.collected.input_grads
        return self.data.inputs.unflatten(grads) if grads else None

    def inputs_with_gradients(self) -> list[Tensor]:
        """The inputs, whole, that take one."""
        source = self.data.inputs
        leaves = [] if source.whole is None else source.flatten(source.whole)
        return [leaves[i] for i, g in enumerate(self.collected.input_grads) if g is not None]

    @property
    def num_targets(self) -> int:
        """How many targets are not ignored. What the first sweep has not counted of a reader's is read now."""
        known, collected = self.data.count(), self.collected
        if known is not None:
            return known
        assert self.data.targets is not None
        while collected.counted_to < self.time:
            span = Span(collected.counted_to, min(collected.counted_to + self.cut.chunk, self.time))
            self._count(span, self.data.targets.read(*span))
        return int(collected.num_targets)

    def outputs_of(self, along: Sequence[Tensor]) -> tree.Tree:
        """The tree of the model's outputs, of tensors along the whole sequence."""
        assert self._spec is not None
        return tree.unflatten(along, self._spec)

    def chunk_context(self, position: int) -> AbstractContextManager[None]:
        """Stand-ins and seed; -1 for the initial state."""
        return self.shared.entered(derive_seed(self.seed, position))

    def draws(self) -> list[bytes]:
        """Where the random generators stand."""
        return [generator.get_state().numpy().tobytes() for generator in generators(*self.shared.devices)]

    def read(self, span: Span, *, head: bool) -> Piece:
        """The chunk, from wherever it comes."""
        targets = self._loss_fn is not None and (head or self.compares_targets)
        data = self.data.read(*span, targets=targets)
        # what only one sweep reads needs no checksum
        compared = data if self.compares_targets else data._replace(targets=None)
        read, leaves = self.data.checksums(compared), list[Tensor]()
        inputs = data.inputs
        if any(g is not None for g in self.collected.input_grads):
            parts = self.data.inputs.flatten(inputs)
            for i in [i for i, g in enumerate(self.collected.input_grads) if g is not None]:
                parts[i] = parts[i].detach().requires_grad_()
                leaves.append(parts[i])
            inputs = self.data.inputs.unflatten(parts)
        return Piece(span, inputs, data.targets, leaves, read)

    def advance(self, piece: Piece, state: tree.Tree) -> ChunkResult:
        """The state after the chunk."""
        with self.shared.autocast(as_called=True):
            return ChunkResult(self.shared.advance(piece.inputs, state))

    def run(self, piece: Piece, state: tree.Tree) -> ChunkResult:
        """The chunk's loss (or outputs) and the state after it."""
        with self.shared.autocast(as_called=True):
            outputs, following = self.shared.step(piece.inputs, state)
            if self._loss_fn is None:
                return ChunkResult(following, self._output_leaves(outputs, piece.span))
            kept = [version(x) for x in tree.tensors(following)]
            loss = returned = self._loss_fn(outputs, piece.targets)
        if kept != [version(x) for x in tree.tensors(following)]:
            raise InputError(
                "loss_fn wrote in place to outputs that share memory with the state; expected it to leave them alone. "
                "Clone the outputs first"
            )
        metrics: dict[str, Tensor] = {}
        if isinstance(loss, dict):
            metrics = {
                name: _addable(torch.as_tensor(value).detach()) for name, value in loss.items() if name != "loss"
            }
            if "loss" not in loss:
                raise InputError(f"loss_fn returned a dict without 'loss'; got the keys {sorted(loss)}")
            loss = loss["loss"]
        self._check_loss(loss, piece.span, outputs)
        if not self._sums.settled:
            with self.shared.autocast(as_called=True):
                if self._per_token:
                    self._sums.require_per_token(outputs, piece.targets, self.batch, piece.span)
                else:
                    self._sums.require(returned, outputs, piece.targets, self.batch, piece.span, len(self.cut))
        return ChunkResult(following, [loss], loss, metrics)

    def backward(self, span: Span, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
        """Into the chunk's leaves, the context and the stand-ins."""
        self.shared.backward(roots, leaves, f"{span}")

    def forget(self) -> bool:
        """Drop the gradients that a failed backward pass left, if there are no others among them."""
        return self.shared.gather is not None and self.shared.gather.forget()

    def collect(self, piece: Piece, result: ChunkResult, phase: str) -> None:
        """Add up the losses, once; write the inputs' gradients down."""
        span, collected = piece.span, self.collected
        if self.takes_nothing:
            self.shared.refuse_trained(result.outputs, f"{span}")
        if phase == "reverse":
            slots = [g for g in collected.input_grads if g is not None]
            for slot, leaf in zip(slots, piece.leaves, strict=True):
                if leaf.grad is not None:
                    slot[:, span.start : span.stop] = leaf.grad
        if self._counts and span.stop > collected.counted_to:  # whoever asked earlier has read it for the count
            self._count(span, piece.targets)
        if phase == self._collect_in and result.outputs:
            if result.loss is None or self._per_token:
                collected.write(result.outputs, span, self.time)
            else:
                collected.add_loss(result.loss, result.metrics)

    def _count(self, span: Span, targets: Any) -> None:
        self.collected.num_targets += self.data.count_in(targets)
        self.collected.counted_to = span.stop

    def _output_leaves(self, outputs: Any, span: Span) -> list[Tensor]:
        if self._spec is None:
            self._spec = tree.flatten(outputs)[1]
        like = tree.skeleton(self._spec)
        try:
            leaves = tree.flatten_like(outputs, like)
        except ValueError as error:
            raise ModelError(
                f"forward returned outputs of another structure in {span} than before: {error}. Return the same "
                "containers, with the same keys, in every chunk"
            ) from None
        if not leaves:
            raise ModelError("forward returned no outputs; slimgrad.outputs expects tensors [batch, time, ...]")
        expected = (self.batch, span.stop - span.start)
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor) or x.shape[:2] != expected:
                name = tree.paths(like, alone="(the output itself)")[i]
                came = f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ModelError(
                    f"output {name} is {came}; slimgrad.outputs expects tensors [batch, time, ...], here "
                    f"[{expected[0]}, {expected[1]}, ...]. Leave it out of what forward returns, give it a time axis, "
                    "or carry it in the state"
                )
        return leaves

    def _check_loss(self, loss: Any, span: Span, outputs: Any) -> None:
        expected = (self.batch, span.stop - span.start) if self._per_token else ()
        if not isinstance(loss, Tensor) or loss.shape != torch.Size(expected):
            came = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            kind = "one loss per token, shape" if self._per_token else "the sum over the chunk, shape"
            raise InputError(f"loss_fn must return {kind} {list(expected)}; got {came}")
        if not loss.is_floating_point():
            kind = "a complex" if loss.is_complex() else "an integer"
            raise InputError(
                f"loss_fn returned {kind} tensor, which has no gradient; expected a floating one, got {loss.dtype}. "
                "A count goes beside the loss, as a metric: {'loss': ..., 'errors': ...}"
            )
        # a chunk that is left out may well say so by a constant zero; any other number came from somewhere
        lost = torch.is_grad_enabled() and not loss.requires_grad and bool((loss != 0).any())
        if lost and any(x.requires_grad for x in tensors_within(outputs)):
            raise InputError(
                f"loss_fn returned a loss without a graph for {span}, though the outputs "
                "have one: its gradient would be lost. Compute it from the outputs, without .detach(), .item() or "
                "no_grad; for a chunk that is left out return zero"
            )


def _addable(metric: Tensor) -> Tensor:
    """A copy, in a type in which many chunks' values add up."""
    if metric.is_floating_point() or metric.is_complex():
        return metric.to(torch.promote_types(metric.dtype, torch.float32), copy=True)
    return metric.to(torch.int64, copy=True)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What losses are added up in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
