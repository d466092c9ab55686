"""A model and its sequence as a program of chunks: what the sweep runs.

Here the inputs are sliced and moved, the targets shifted, the stand-ins, seeds and autocast of each chunk entered, the
losses added up and the inputs' gradients written down.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils import parametrize

from slimgrad.errors import InputError, ModelError
from slimgrad.guard import Guard, counted_by_frequency, refuse_by_options
from slimgrad.losses import IGNORED, is_mean_over_time
from slimgrad.sweep import tree
from slimgrad.sweep.carriers import Root
from slimgrad.sweep.carriers.plain import version
from slimgrad.sweep.fused import is_compiled
from slimgrad.sweep.gather import Gather
from slimgrad.sweep.graph import find_strangers
from slimgrad.sweep.interrupt import uninterrupted
from slimgrad.sweep.random import derive_seed, seeded
from slimgrad.sweep.run import ChunkResult
from slimgrad.watch import Watch

LossFn = Callable[[Any, Any], "Tensor | dict[str, Tensor]"]


class SharedModel:
    """What all sequences of one call share: the model with its stand-ins, the context, autocast, what is watched.

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
        self.context = None if context is None else tree.map_tensors(self._stand_in_for_context, context)
        # forward alone where something is compiled: it and an `advance` that is not would differ in bits
        self._advance = None if any(map(is_compiled, model.modules())) else getattr(model, "advance", None)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", self.device.type}
        ]
        renormalised = refuse_by_options(model, lambda p: gather is not None and p.requires_grad)
        self._guard = Guard(model, renormalised)
        self._watch = Watch(model)
        self._tried: set[str] = set()
        self._seed = 0

    def _stand_in_for_context(self, x: Tensor) -> Tensor:
        if not (self.gather is not None and x.requires_grad):
            return x
        self.context_leaves.append(self.gather.leaf_for(x))
        return self.context_leaves[-1]

    @contextmanager
    def entered(self, seed: int) -> Generator[None]:
        """Everything that must be the same each time a chunk runs."""
        self._seed = seed
        stand_ins = nullcontext() if self.gather is None else self.gather.swapped_into(self.model)
        # signals wait until the model is its own again; whoever insists, sends a second
        with (
            uninterrupted(second_passes=True),
            seeded(seed, self.device),
            caches_aside(),
            stand_ins,
            self._guard.watching(),
        ):
            yield

    @contextmanager
    def autocast(self, *, as_called: bool) -> Generator[None]:
        """The autocast of the call, for the model; or none, for a backward pass, as torch advises."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                wanted = enabled and as_called
                if wanted or torch.is_autocast_enabled(kind):
                    # without the cache: a cast cached under no_grad would come back without a graph
                    stack.enter_context(torch.autocast(kind, dtype, enabled=wanted, cache_enabled=False))
            yield

    def _run(self, method: str, call: Callable[..., Any], inputs: tree.Tree, state: tree.Tree) -> Any:
        """Call one of the model's methods; the first time on copies of the buffers, its attributes watched."""

        def run(state: tree.Tree) -> Any:
            return call(inputs, state) if self.context is None else call(inputs, state, self.context)

        before = [version(x) for x in tree.tensors(inputs)]
        if method in self._tried:
            result = run(state)
        else:
            self._tried.add(method)
            with self._guard.watching(first=True):
                result = self._watch.run(method, run, state, lambda: seeded(self._seed, self.device))
            if self.gather is not None:
                self.gather.refuse_hooks()
        if before != [version(x) for x in tree.tensors(inputs)]:
            raise ModelError(
                "the model modified its inputs in place; expected them left alone, since each chunk is read twice. "
                "Clone them first: inputs = inputs.clone()"
            )
        return result

    def step(self, inputs: tree.Tree, state: tree.Tree) -> tuple[Any, tree.Tree]:
        """The model's forward."""
        result = self._run("forward", self.model, inputs, state)
        if not (isinstance(result, tuple) and len(cast("tuple[Any, ...]", result)) == 2):
            raise ModelError(f"forward must return (outputs, next_state), got {type(result).__name__}")
        return cast("tuple[Any, tree.Tree]", result)

    def advance(self, inputs: tree.Tree, state: tree.Tree) -> tree.Tree:
        """The model's `advance`, or its forward without the outputs."""
        if self._advance is None:
            return self.step(inputs, state)[1]
        return self._run("advance", self._advance, inputs, state)

    def backward(self, roots: Sequence[Root], leaves: Sequence[Tensor], where: str) -> None:
        """Backpropagate from the roots into `leaves`, the context and the stand-ins, if nothing would be lost."""
        assert self.gather is not None
        edges = [get_gradient_edge(x) for x in leaves]
        tensors = [root.tensor for root in roots]
        self.refuse_lost(tensors, edges, where)
        with self.autocast(as_called=False):
            self.gather.backward(tensors, [root.cotangent for root in roots], edges)

    def refuse_lost(self, tensors: Sequence[Tensor | GradientEdge], edges: Sequence[GradientEdge], where: str) -> None:
        """Raise if the graph below `tensors` ends in a leaf whose gradient nobody would gather."""
        assert self.gather is not None
        strangers, counted = find_strangers(tensors, [*edges, *self.gather.edges])
        if counted:
            raise counted_by_frequency(where)
        if not strangers:
            return
        (leaf, *_) = strangers
        name = self.gather.name_of(leaf)
        if name is not None:
            raise ModelError(
                f"{where}: parameter {name} was used, but not read from its module: a dict, a list or a closure holds "
                "it beside. While a chunk runs, a module's parameters are stand-ins, so its gradient would be lost. "
                "Read it from the module in forward (or refresh what holds it there)"
            )
        sharded = ""
        if hasattr(leaf, "_is_flat_param"):
            sharded = ". It is FullyShardedDataParallel's: use fully_shard(slimgrad.Chunked(model)) instead"
        raise ModelError(
            f"{where}: the loss depends on a tensor of shape {tuple(leaf.shape)} that requires gradients and is "
            "neither a parameter of the model, nor an input, nor part of the state: its gradient would be lost. Make "
            "it a parameter of the model (a loss with parameters is a method of the model), pass it as context, or "
            f"detach it{sharded}"
        )


@contextmanager
def caches_aside() -> Generator[None]:
    """Two caches of torch's that outlive a chunk, set aside: parametrised weights, and shapes that became dynamic.

    A compiled chunk must run one graph in both sweeps; torch.compile would replace it by one for any length as soon as
    a shorter chunk comes.
    """
    cached = parametrize._cache_enabled, parametrize._cache  # pyright: ignore[reportPrivateUsage]
    parametrize._cache_enabled, parametrize._cache = 0, {}  # pyright: ignore[reportPrivateUsage]
    dynamo = sys.modules.get("torch._dynamo")
    try:
        if dynamo is None:
            yield
            return
        with dynamo.config.patch(automatic_dynamic_shapes=False), warnings.catch_warnings():
            # Dynamo asks every input for its .grad, the values of sums among them, which are no leaves
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = cached  # pyright: ignore[reportPrivateUsage]


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
        self.shared, self._targets = shared, targets
        self._inputs, self._spec = tree.flatten(inputs)
        self._target_leaves, self._target_spec = tree.flatten(targets)
        self._chunk, self._seed, self._loss_fn = chunk, seed, loss_fn
        self._per_token, self._collect_in = per_token, collect_in
        if targets is None:
            self._tokens = next_token_inputs(inputs)
        elif batch_and_time(targets) != (self.batch, self.time):
            raise InputError(
                f"targets must have the inputs' batch and time ({self.batch}, {self.time}), got "
                f"{batch_and_time(targets)}: one target for each step. For one label per sequence write it at the step "
                "that should predict it and -100 at all others; for regression pass a dict of targets and a mask, both "
                "[batch, time, ...], with a loss_fn that uses the mask and normalizer= the number of steps that count"
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
    def input_grads(self) -> tree.Tree:
        """The inputs' gradients in their tree; None where none is wanted."""
        return tree.unflatten(self._input_grads, self._spec)

    def span(self, chunk: int) -> tuple[int, int]:
        """The chunk's first token and the one after its last."""
        return chunk * self._chunk, min((chunk + 1) * self._chunk, self.time)

    def chunk_context(self, chunk: int) -> Any:
        """Stand-ins and seed; -1 for the initial state."""
        return self.shared.entered(derive_seed(self._seed, chunk + 1))

    def advance(self, chunk: int, state: tree.Tree) -> tree.Tree:
        """The state after the chunk."""
        with self.shared.autocast(as_called=True):
            return self.shared.advance(self._pieces(chunk)[0], state)

    def run(self, chunk: int, state: tree.Tree) -> ChunkResult:
        """The chunk's loss and the state after it."""
        pieces, leaves = self._pieces(chunk)
        with self.shared.autocast(as_called=True):
            outputs, following = self.shared.step(pieces, state)
            kept = [version(x) for x in tree.tensors(following)]
            loss = self._loss_fn(outputs, self._target_slice(chunk))
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
        self._check_loss(loss, chunk, outputs)
        if self.num_chunks > 1 and is_mean_over_time(loss, self.batch, self.span(chunk)):
            raise InputError(
                "loss_fn returned the mean over its chunk; expected the sum, so that the chunks add up to the loss of "
                "the whole, which slimgrad then divides by the number of targets (normalizer=). Use reduction='sum', "
                "or .sum() in place of .mean()"
            )
        return ChunkResult(loss, following, metrics, leaves)

    def backward(self, chunk: int, roots: Sequence[Root], leaves: Sequence[Tensor]) -> None:
        """Into the chunk's leaves, the context and the stand-ins."""
        self.shared.backward(roots, leaves, f"chunk {chunk}")

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
        return self.shared.gather is not None and isinstance(x, Tensor) and x.requires_grad

    def _pieces(self, chunk: int) -> tuple[tree.Tree, list[Tensor]]:
        """The chunk of the inputs, and those of its tensors that take gradients."""
        pieces, leaves = [self._slice(x, chunk) for x in self._inputs], list[Tensor]()
        if torch.is_grad_enabled():
            for position, whole in enumerate(self._inputs):
                if self._takes_grad(whole):
                    pieces[position] = pieces[position].detach().requires_grad_()
                    leaves.append(pieces[position])
        return tree.unflatten(pieces, self._spec), leaves

    def _slice(self, x: Tensor, chunk: int) -> Tensor:
        start, stop = self.span(chunk)
        return x[:, start:stop].to(self.shared.device, non_blocking=True)

    def _target_slice(self, chunk: int) -> tree.Tree:
        if self._targets is not None:
            return tree.unflatten([self._slice(x, chunk) for x in self._target_leaves], self._target_spec)
        start, stop = self.span(chunk)
        shifted = self._tokens[:, start + 1 : stop + 1].to(self.shared.device).long()
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


def _addable(metric: Tensor) -> Tensor:
    """A copy, in a type in which many chunks' values add up."""
    if metric.is_floating_point() or metric.is_complex():
        return metric.to(torch.promote_types(metric.dtype, torch.float32), copy=True)
    return metric.to(torch.int64, copy=True)


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
