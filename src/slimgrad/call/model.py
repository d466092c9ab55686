"""A model as a sweep sees it: on stand-ins, seeded, under the autocast of the call, and watched."""

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

from slimgrad.call.guard import (
    Guard,
    counted_by_frequency,
    readable,
    refuse_backward_hooks,
    refuse_by_options,
    set_to_themselves,
)
from slimgrad.call.watch import Watch
from slimgrad.errors import ConsumedError, ModelError
from slimgrad.gradients.buffers import Gather
from slimgrad.gradients.fused import is_compiled
from slimgrad.gradients.graph import find_strangers
from slimgrad.states.base import Root
from slimgrad.states.checksum import checksum
from slimgrad.states.tensors import version
from slimgrad.sweep import tree
from slimgrad.sweep.interrupt import uninterrupted
from slimgrad.sweep.random import seeded
from slimgrad.sweep.turn import turn


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
        self.device = device_of(model)
        # in an order that is the same each time
        self.devices = [*dict.fromkeys([self.device, *(x.device for x in (*model.parameters(), *model.buffers()))])]
        self.context_leaves: list[Tensor] = []
        self._context = None if context is None else tree.flatten(tree.map_tensors(self._stand_in_for_context, context))
        self._of_context = tree.tensors(context)
        self._context_versions = [version(x) for x in self._of_context]
        # forward alone where something is compiled: it and an `advance` that is not would differ in bits
        self._advance = None if any(map(is_compiled, model.modules())) else getattr(model, "advance", None)
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", self.device.type}
        ]
        if gather is not None:
            refuse_backward_hooks(model)
        renormalised = refuse_by_options(model, lambda p: gather is not None and p.requires_grad)
        self._guard = Guard(model, renormalised | set_to_themselves(model))
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
            seeded(seed, *self.devices),
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
            if self._context is None:
                return call(inputs, state)
            return call(inputs, state, tree.unflatten(*self._context))  # in containers of its own, as inputs are

        before, gathered = [version(x) for x in tree.tensors(inputs)], self._gathered()
        if self._context_is_written():
            raise ConsumedError(
                "the context was written to between two chunks; expected it left alone until the gradient is there: "
                "the chunks before and after would be given other values. Clone it for whoever writes to it"
            )
        if method in self._tried:
            result = run(state)
        else:
            bits = self._context_bits()
            with self._guard.watching(first=True):
                result = self._watch.run(method, run, state, lambda: seeded(self._seed, *self.devices))
            if self.gather is not None:
                self.gather.refuse_hooks()
            if bits != self._context_bits():
                raise _wrote_to_context()
            self._tried.add(method)
        _refuse_dropped(gathered)
        if self._context_is_written():
            raise _wrote_to_context()
        if before != [version(x) for x in tree.tensors(inputs)]:
            raise ModelError(
                "the model modified its inputs in place; expected them left alone, since each chunk is read twice. "
                "Clone them first: inputs = inputs.clone()"
            )
        return result

    def _gathered(self) -> list[tuple[Tensor, Tensor, int]]:
        """Where gradients gather, with what has, and its version."""
        if self.gather is None:
            return []
        leaves = [*self.gather.stand_ins, *self.context_leaves]
        return [(x, g, g._version) for x in leaves if (g := x.grad) is not None]

    def _context_is_written(self) -> bool:
        return self._context_versions != [version(x) for x in self._of_context]

    def _context_bits(self) -> list[int]:
        """Of what torch counts no versions of, too: inference tensors, and what is written to through `.data`."""
        return [int(checksum(x.detach().resolve_neg())) for x in self._of_context if readable(x)]

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
        wholly = len(self.devices) == 1 and all(x.device == self.device for x in leaves)
        with self.autocast(as_called=False), turn.lent(self.device, wholly=wholly):
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

    def refuse_trained(self, outputs: Sequence[Tensor], where: str) -> None:
        """Raise if a parameter is in the graph of what came of a model, an input and a state that take no gradient."""
        strangers, _ = find_strangers([x for x in outputs if x.requires_grad], [])
        found = [x for x in strangers if isinstance(x, nn.Parameter)]  # the leaves of states are none
        if found:
            raise ModelError(
                f"{where}: no parameter of the model, no input and no state requires a gradient, but a trainable "
                f"parameter beside them does, of shape {tuple(found[0].shape)} (a head in loss_fn, a prompt), whose "
                "gradient would be lost. Make it a parameter of the model (a loss with parameters is a method of the "
                "model), pass it as context, or call within torch.no_grad() where no gradient is wanted"
            )


def _refuse_dropped(gathered: list[tuple[Tensor, Tensor, int]]) -> None:
    """Raise if one of the leaves has another `.grad` than it had, or the same one written to."""
    if any(x.grad is not g or g._version != number for x, g, number in gathered):
        raise ModelError(
            "forward changed the .grad of the model's parameters (zero_grad, a .backward() within), where the "
            "gradients of the chunks gather: they would be lost. Expected forward to leave .grad alone; call "
            "zero_grad between calls, and use torch.autograd.grad for gradients that the model takes itself"
        )


def _wrote_to_context() -> ModelError:
    return ModelError(
        "the model modified its context in place; expected it left alone, since every chunk is given the same one, and "
        "each of them twice. Clone it first: context = context.clone()"
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: its first parameter, or buffer."""
    first = next((x for x in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def caches_aside() -> Generator[None]:
    """Two caches of torch's that outlive a chunk, set aside: parametrised weights, and shapes that became dynamic.

    A compiled chunk must run one graph in both sweeps; torch.compile would replace it by one for any length as soon as
    a shorter chunk comes.
    """
    cached = parametrize._cache_enabled, parametrize._cache  # pyright: ignore[reportPrivateUsage]
    parametrize._cache_enabled, parametrize._cache = 0, {}  # pyright: ignore[reportPrivateUsage]
    dynamo = sys.modules.get("torch._dynamo")
    dynamic = None if dynamo is None else dynamo.config.automatic_dynamic_shapes
    try:
        if dynamo is None:
            yield
            return
        dynamo.config.automatic_dynamic_shapes = False  # config.patch would make a class for every chunk
        with warnings.catch_warnings():
            # Dynamo asks every input for its .grad, the values of sums among them, which are no leaves
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            yield
    finally:
        if dynamo is not None:
            dynamo.config.automatic_dynamic_shapes = dynamic
        parametrize._cache_enabled, parametrize._cache = cached  # pyright: ignore[reportPrivateUsage]
