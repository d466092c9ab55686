"""What a model must offer: a causal step, and the state before the first one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from slimgrad.errors import InputError, ModelError
from slimgrad.states import raw_tensor
from slimgrad.sweep import tree


@runtime_checkable
class CausalModel(Protocol):
    """A causal sequence model as a step: `(chunk of inputs, state) -> (outputs, next state)`.

    Implement it on a `torch.nn.Module`. Running a sequence whole, or in chunks with the state handed on, must give the
    same outputs: `slimgrad.verify` checks that.

    A model may also offer `advance(inputs, state[, context]) -> next_state`, which the forward sweep calls instead of
    `forward` where it needs no outputs. It must compute the state by the same operations, and draw a prefix of the
    random numbers that `forward` draws.
    """

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first chunk: a pytree of tensors, `PrefixSum` and `Growing`. May use parameters."""
        ...

    def forward(self, inputs: Any, state: Any, /) -> tuple[Any, Any]:
        """One chunk: `inputs` `[batch, time, ...]` -> (outputs, next state). A context comes third, if given."""
        ...


_SHARD = (
    "A sharded layer replaces its parameters when it runs, and the gradient would miss their stand-ins. Shard around "
    "the call instead: fully_shard(slimgrad.Chunked(model, ...)), without sharding the layers below it"
)


def require_causal_model(model: object) -> nn.Module:
    """`model`, if it can be swept; else a `ModelError` that says what is missing."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for part in model.modules():
        if type(part).__module__.startswith("torch.distributed") and type(part).__name__ == "FullyShardedDataParallel":
            raise ModelError(f"expected the plain model, got one with FullyShardedDataParallel inside. {_SHARD}")
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            raise ModelError(
                f"expected the plain model, got one that is sharded by fully_shard, or a part of it. {_SHARD}"
            )
        if getattr(part, "_fsdp_use_orig_params", None) is False:
            raise ModelError(
                f"expected a model with parameters, got one that FullyShardedDataParallel flattened. {_SHARD}"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{part.original_name} was made by torch.jit, which keeps parameters where no stand-ins can take their "
                "place; expected plain modules. Pass the module as it was before torch.jit; torch.compile works"
            )
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in part.parameters(recurse=False)):
            raise ModelError(
                f"{type(part).__name__} has parameters without a shape yet; expected a model whose lazy layers have "
                "been made. Run it once on a short input first"
            )
    wrapped = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if wrapped:
        raise ModelError(
            "expected the plain model, got one inside DistributedDataParallel: its gradients would be synchronised per "
            "chunk or not at all. Wrap the other way round: DistributedDataParallel(slimgrad.Chunked(model, ...))"
        )
    if not callable(getattr(model, "initial_state", None)):
        raise ModelError(
            f"{type(model).__name__} has no initial_state(batch_size); expected a model with initial_state(batch_size) "
            "-> state and forward(inputs, state) -> (outputs, next_state). See slimgrad.CausalModel"
        )
    return model


def of_another_batch(state: Any, batch: int) -> bool:
    """Whether no tensor of a given state has an axis of that length."""
    shapes = [x.shape for leaf in tree.leaves(state) if (x := raw_tensor(leaf)) is not None and x.dim()]
    return bool(shapes) and all(batch not in shape for shape in shapes)


def refuse_another_batch(given: Any, made: Any, batch: int) -> None:
    """Raise where a leaf of a given state differs from the one that the model makes in the length of its batch alone.

    A state of one sequence may be meant for all of them.
    """
    for name, leaf, other in zip(tree.paths(given), tree.leaves(given), tree.leaves(made), strict=False):
        x, y = raw_tensor(leaf), raw_tensor(other)
        if x is None or y is None or x.dim() != y.dim():
            continue
        differing = [(a, b) for a, b in zip(x.shape, y.shape, strict=True) if a != b]
        if len(differing) == 1 and differing[0][0] > 1 and differing[0][1] == batch:
            raise InputError(
                f"state {name}: expected a state for a batch of {batch}, as the inputs have, got {list(x.shape)} where "
                f"the model makes {list(y.shape)}. Pass the state of these sequences"
            )
