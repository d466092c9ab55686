"""A model and its sequence as a program of chunks: what the sweep runs.

Here the inputs are sliced and moved, the targets shifted, the aliases, seeds and autocast of each chunk entered, the
losses added up and the inputs' gradients written down.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimgrad.errors import InputError, ModelError
from slimgrad.losses import IGNORED
from slimgrad.sweep import tree
from slimgrad.sweep.accumulator import checksum
from slimgrad.sweep.gather import Gather
from slimgrad.sweep.interrupt import uninterrupted
from slimgrad.sweep.random import derive_seed, seeded
from slimgrad.sweep.run import ChunkResult

LossFn = Callable[[Any, Any], "Tensor | dict[str, Tensor]"]


class SharedModel:
    """What all sequences of one call share: the model with its aliases, the context, autocast, the buffer guard.

    Args:
        model: a causal model.
        gather: where its gradients gather; None for forward only.
        context: passed whole to every chunk, or None.
    """

    def __init__(self, model: nn.Module, gather: Gather | None, context: tree.Tree | None) -> None:
        self.model = model
        self.gather = gather
        first = next((t for t in (*model.parameters(), *model.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.context_leaves: list[Tensor] = []
        self.context = None if context is None else tree.map_tensors(self._alias_context, context)
        kind = self.device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._buffers = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
            if buffer is not None
        ]
        self._tried: set[str] = set()

    def _alias_context(self, x: Tensor) -> Tensor:
        if not (self.gather is not None and x.requires_grad):
            return x
        leaf = x.detach().requires_grad_()
        self.context_leaves.append(leaf)
        return leaf

    @contextmanager
    def entered(self, seed: int) -> Generator[None]:
        """Everything that must be the same each time a chunk runs."""
        enabled, dtype = self._autocast
        # without the cache: a cast cached under no_grad would come back without a graph
        autocast = torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
        aliases = nullcontext() if self.gather is None else self.gather.swapped_into(self.model)
        # signals wait until the model is its own again; whoever insists, sends a second
        with uninterrupted(second_passes=True), seeded(seed, self.device), autocast, aliases, self._guarded_buffers():
            yield

    @contextmanager
    def _guarded_buffers(self, *, on_copies: bool = False) -> Generator[None]:
        """Refuse a model that writes to its buffers.

        With `on_copies` nothing is written even so, and values are compared too: torch's batch normalisation writes its
        running statistics without counting a version.
        """
        owners = self._buffers
        stand_ins = [buffer.clone() if on_copies else buffer for _, _, buffer in owners]
        versions = [version(stand_in) for stand_in in stand_ins]
        changed: list[str] = []
        try:
            for (module, name, _), stand_in in zip(owners, stand_ins, strict=True):
                module._buffers[name] = stand_in  # pyright: ignore[reportPrivateUsage]
            yield
            for (module, name, buffer), stand_in, before in zip(owners, stand_ins, versions, strict=True):
                present = module._buffers.get(name)  # pyright: ignore[reportPrivateUsage]
                written = present is not stand_in or version(stand_in) != before
                if written or (on_copies and int(checksum(stand_in)) != int(checksum(buffer))):
                    changed.append(f"{type(module).__name__}.{name}")
        finally:
            for module, name, buffer in owners:
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
        if changed:
            raise ModelError(
                f"the model wrote to its buffers while it ran: {', '.join(changed)}. Each chunk runs twice, so the "
                "second run would see other values and the gradient would not be exact. Put such layers in eval mode "
                "(batch normalisation), or carry what they update in the state"
            )

    def _first(self, method: str) -> AbstractContextManager[None]:
        """Each of the model's methods runs on copies of the buffers the first time."""
        if method in self._tried:
            return nullcontext()
        self._tried.add(method)
        return self._guarded_buffers(on_copies=True)

    def step(self, inputs: tree.Tree, state: tree.Tree) -> tuple[Any, tree.Tree]:
        """The model's forward."""
        with self._first("forward"):
            result = self.model(inputs, state) if self.context is None else self.model(inputs, state, self.context)
        if not (isinstance(result, tuple) and len(cast("tuple[Any, ...]", result)) == 2):
            raise ModelError(f"forward must return (outputs, next_state), got {type(result).__name__}")
        return cast("tuple[Any, tree.Tree]", result)

    def advance(self, inputs: tree.Tree, state: tree.Tree) -> tree.Tree:
        """The model's `advance`, or its forward without the outputs."""
        advance = getattr(self.model, "advance", None)
        if advance is None:
            return self.step(inputs, state)[1]
        with self._first("advance"):
            return advance(inputs, state) if self.context is None else advance(inputs, state, self.context)


class ChunkedSequence:
    """One sequence in chunks: a `sweep.Program`.

    Args:
        shared: the model and what goes with it.
        inputs: pytree of `[batch, time, ...]`.
        targets: pytree of `[batch, time, ...]`, or None for next-token prediction.
        chunk: tokens per chunk; the last may be shorter.
        seed: chunk n draws from a seed derived from it and n.
        loss_fn: (outputs, targets) -> the chunk's summed loss, or a dict with "loss" and additive metrics. With
            `per_token`: -> `[batch, time]`.
        per_token: keep every token's loss in `token_losses` instead of adding them up.
        collect_in: the sweep in which losses are noted, "forward" or "reverse".
    """

    def __init__(
        self,
        shared: SharedModel,
        inputs: tree.Tree,
        targets: tree.Tree | None,
        *,
        chunk: int,
        seed: int,
        loss_fn: LossFn,
        per_token: bool = False,
        collect_in: str = "forward",
    ) -> None:
        self.batch, self.time = batch_and_time(inputs)
        self._shared, self._targets = shared, targets
        self._inputs, self._spec = tree.flatten(inputs)
        self._target_leaves, self._target_spec = tree.flatten(targets)
        self._chunk, self._seed, self._loss_fn = chunk, seed, loss_fn
        self._per_token, self._collect_in = per_token, collect_in
        if targets is None:
            self._tokens = next_token_inputs(inputs)
        elif batch_and_time(targets) != (self.batch, self.time):
            raise InputError(
                f"targets must have the inputs' batch and time ({self.batch}, {self.time}), "
                f"got {batch_and_time(targets)}"
            )
        self.loss_sum = torch.zeros((), dtype=sum_dtype(shared.device), device=shared.device)
        self.loss_dtype = torch.float32
        self.metrics: dict[str, Tensor] = {}
        self.token_losses: Tensor | None = None
        self._input_grads = [torch.zeros_like(x) if self._takes_grad(x) else None for x in self._inputs]

    @property
    def num_chunks(self) -> int:
        """ceil(time / chunk)."""
        return -(-self.time // self._chunk)

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The aliases, and the context's leaves."""
        aliases = [] if self._shared.gather is None else self._shared.gather.aliases
        return [*aliases, *self._shared.context_leaves]

    @property
    def input_grads(self) -> tree.Tree:
        """The inputs' gradients in their tree; None where none is wanted."""
        return tree.unflatten(self._input_grads, self._spec)

    def span(self, chunk: int) -> tuple[int, int]:
        """The chunk's first token and the one after its last."""
        return chunk * self._chunk, min((chunk + 1) * self._chunk, self.time)

    def chunk_context(self, chunk: int) -> Any:
        """Aliases, seed, autocast; -1 for the initial state."""
        return self._shared.entered(derive_seed(self._seed, chunk + 1))

    def advance(self, chunk: int, state: tree.Tree) -> tree.Tree:
        """The state after the chunk."""
        return self._shared.advance(tree.unflatten([self._slice(x, chunk) for x in self._inputs], self._spec), state)

    def run(self, chunk: int, state: tree.Tree) -> ChunkResult:
        """The chunk's loss and the state after it."""
        pieces = [self._slice(x, chunk) for x in self._inputs]
        leaves: list[Tensor] = []
        if torch.is_grad_enabled():
            for position, whole in enumerate(self._inputs):
                if self._takes_grad(whole):
                    pieces[position] = pieces[position].detach().requires_grad_()
                    leaves.append(pieces[position])
        outputs, following = self._shared.step(tree.unflatten(pieces, self._spec), state)
        loss = self._loss_fn(outputs, self._target_slice(chunk))
        if self._shared.gather is not None:
            self._shared.gather.paused = False
        metrics: dict[str, Tensor] = {}
        if isinstance(loss, dict):
            metrics = {name: torch.as_tensor(value).detach() for name, value in loss.items() if name != "loss"}
            if "loss" not in loss:
                raise InputError(f"loss_fn returned a dict without 'loss'; got the keys {sorted(loss)}")
            loss = loss["loss"]
        self._check_loss(loss, chunk, outputs)
        return ChunkResult(loss, following, metrics, leaves)

    def collect(self, chunk: int, result: ChunkResult, phase: str) -> None:
        """Add up the losses, once; write the inputs' gradients down."""
        start, stop = self.span(chunk)
        if phase == "reverse":
            slots = [g for g in self._input_grads if g is not None]
            for slot, leaf in zip(slots, result.leaves, strict=True):
                if leaf.grad is not None:
                    slot[:, start:stop] = leaf.grad
        if phase != self._collect_in:
            return
        self.loss_dtype = result.loss.dtype
        if self._per_token:
            if self.token_losses is None:
                self.token_losses = result.loss.new_empty((self.batch, self.time), requires_grad=False)
            self.token_losses[:, start:stop] = result.loss.detach()
            return
        self.loss_sum += result.loss.detach()
        for name, value in result.metrics.items():
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def slicer(self, per_token: Tensor) -> Callable[[int], Tensor]:
        """From a chunk's number to its part of a `[batch, time]` tensor."""
        return lambda chunk: per_token[:, slice(*self.span(chunk))]

    def _takes_grad(self, x: Any) -> bool:
        return self._shared.gather is not None and isinstance(x, Tensor) and x.requires_grad

    def _slice(self, x: Tensor, chunk: int) -> Tensor:
        start, stop = self.span(chunk)
        return x[:, start:stop].to(self._shared.device, non_blocking=True)

    def _target_slice(self, chunk: int) -> tree.Tree:
        if self._targets is not None:
            return tree.unflatten([self._slice(x, chunk) for x in self._target_leaves], self._target_spec)
        start, stop = self.span(chunk)
        shifted = self._tokens[:, start + 1 : stop + 1].to(self._shared.device).long()
        if stop == self.time:  # the last token has no target
            shifted = torch.cat([shifted, shifted.new_full((self.batch, 1), IGNORED)], dim=1)
        return shifted

    def _check_loss(self, loss: Any, chunk: int, outputs: Any) -> None:
        start, stop = self.span(chunk)
        expected = (self.batch, stop - start) if self._per_token else ()
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
        if lost and any(x.requires_grad for x in tree.tensors(outputs)):
            raise InputError(
                f"loss_fn returned a loss without a graph for tokens {start} to {stop - 1}, though the outputs have "
                "one: its gradient would be lost. Compute it from the outputs, without .detach(), .item() or no_grad; "
                "for a chunk that is left out return zero"
            )


def batch_and_time(inputs: tree.Tree) -> tuple[int, int]:
    """The first two axes, which all tensors of the tree share."""
    shapes = {tuple(leaf.shape[:2]) if isinstance(leaf, Tensor) else () for leaf in tree.leaves(inputs)}
    shape = next(iter(shapes)) if len(shapes) == 1 else ()
    if len(shape) != 2:
        described = ", ".join(
            f"a tensor {list(leaf.shape)}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
            for leaf in tree.leaves(inputs)
        )
        raise InputError(
            f"expected tensors [batch, time, ...] with the same batch and time, got {described or 'nothing'}. "
            "For NumPy arrays use torch.from_numpy"
        )
    batch, time = shape
    if batch < 1 or time < 1:
        raise InputError(f"expected at least one sequence and one token, got batch {batch} and time {time}")
    return batch, time


def next_token_inputs(inputs: tree.Tree) -> Tensor:
    """The token tensor that is its own target, one step later."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        raise InputError("targets=None means next-token prediction, which needs integer inputs [batch, time]")
    return inputs


def sum_dtype(device: torch.device) -> torch.dtype:
    """What losses are added up in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def version(x: Tensor) -> int:
    """How often torch saw `x` written to. Inference tensors do not count."""
    return 0 if x.is_inference() else int(cast(Any, x)._version)
