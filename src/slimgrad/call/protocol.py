"""What a model must offer: a causal step, and the state before the first one."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from slimgrad.errors import ModelError


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
