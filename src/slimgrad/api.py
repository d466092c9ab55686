"""The public functions: exact gradients of any causal model over a sequence of any length, chunk by chunk.

`backward` leaves parameter gradients in `.grad`; `outputs`, `loss` and `token_loss` return tensors to go back from;
`Chunked` is the module that data parallelism wraps; `evaluate` goes forward only. `verify` (in `verification`) says
whether it is all really exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import decide, make_plan
from slimgrad.budget.request import Request
from slimgrad.call.arguments import DEFAULT_CHUNK, Call, Normalizer, Options, Result
from slimgrad.call.losses import cross_entropy_sum, token_cross_entropy
from slimgrad.call.outputs import loss_of, outputs_of
from slimgrad.call.parallel import one_thread_at_a_time, refuse_unsynchronised
from slimgrad.call.program import LossFn
from slimgrad.call.protocol import require_causal_model
from slimgrad.call.together import join
from slimgrad.gradients.sink import Sink
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.program import OnChunk
from slimgrad.sweep.run import everywhere
from slimgrad.sweep.schedules.base import Schedule


@not_traced
def backward(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    context: Any = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    normalizer: Normalizer = "targets",
    state: Any = None,
    final_state_grad: Any = None,
    final_states: bool = False,
    on_chunk: OnChunk | None = None,
    sink: Mapping[str, Sink] | None = None,
) -> Result:
    """Compute the loss and add its exact gradient to every parameter's `.grad`, in memory of one chunk.

    The gradient is that of `sum over chunks of loss_fn(outputs, targets) / normalizer`, as plain backpropagation over
    the whole sequence would give it.

    Args:
        model: a causal model (see `CausalModel`).
        inputs: a tensor `[batch, time, ...]`, a pytree (dicts, tuples) of them, a `Reader`, or a list of these, each of
            which starts from the initial state (packed documents; 1-D tensors are batches of one). Documents of nearby
            lengths that fit into a chunk go through together, padded, where nothing could tell (see `final_states`).
        targets: likewise; -100 is ignored. None: the next token, the last having no target.
        context: passed whole to every chunk as the model's third argument (images, an encoder's output).
        chunk: tokens whose graph lives at once; a remainder of one token joins the chunk before it. None, with neither
            `memory` nor `plan`: up to 4,096 tokens are one chunk, that is, plain backpropagation, and a longer sequence
            has the memory that is free.
        memory: in its place, what the process may hold, weights included (on CUDA: what torch's allocator reserves):
            bytes, or text as "2GiB". The fastest plan within it is chosen by measurements of this model, made when it
            is first called so; on a CPU it is made anew where the process holds so much more that it would not fit.
        plan: in their place, a plan that was made before (`Result.plan`, `slimgrad.plan`).
        schedule: how the states before each chunk are found again; None chooses, and logs the choice.
        loss_fn: (outputs, targets) -> the sum over a chunk, or a dict with "loss" and additive metrics. Default:
            cross-entropy in nats.
        normalizer: "targets" (their count over all sequences), a number, or a 0-d tensor.
        state: the state to start from instead of `model.initial_state(batch)`. Its tensors that require gradients get
            theirs, like those of inputs and context.
        final_state_grad: the gradient of the final state, from whoever goes on with it: the state's tree, with a
            tensor or None for each leaf.
        final_states: of a list, run each document by itself and keep the state after it. So it is anyway where `state`,
            `context`, `loss_fn` or `on_chunk` is given, where a budget is given or taken (see `chunk`), where an input
            is not a tensor of tokens, and where rows of a batch are not independent of each other or something is drawn
            at random.
        on_chunk: called with an `Event` after every chunk.
        sink: by parameter name, a function that takes each chunk's gradient of it; nothing of it then reaches `.grad`.
            Whatever is linear in the gradient (a projection, a selection of columns) stays exact.

    Returns:
        A `Result`.

    Raises:
        InputError: an argument does not fit, or the budget cannot be met: before any work; what `loss_fn` returns: when
            it is first called.
        ModelError: the model does not follow the protocol, or a gradient would be lost.
        SweepError: the gradient would not be exact. StateMismatchError: a state was rebuilt with other bits.
            NonFiniteError: a NaN or an infinity reached a `PrefixSum`. ConsumedError: inputs, weights, buffers or
            context changed on the way. LossMismatchError: a loss did (of a tape that was given up).
        MemoryLimitError: a chunk does not fit into memory, and cannot be taken in parts (which is tried, and logged).
        StorageError: states that are kept on disk find no room, or are read back with other bytes.
        In each case `.grad` is as it was; what a sink took before stays taken.

    Cost: plain backpropagation, and one forward pass more over all chunks but the last and those on the schedule's
    tape; with `Every` and `Binomial` further ones. They leave out the output head where the model has `advance` and
    nothing in it is compiled. Memory: the graph of one chunk and those on the tape, the kept states, the gradients.
    Source: Algorithm 1, "Sub-Linear Memory: How to Make Performers SLiM".

    Example:
        >>> result = backward(model, tokens, chunk=1024)    # tokens: [1, 1_000_000]
        >>> optimizer.step()
    """
    refuse_unsynchronised(model)
    options = Options(context, DEFAULT_CHUNK, schedule, loss_fn or cross_entropy_sum, normalizer, state, on_chunk)
    request = Request(model, inputs, targets, options, sink)
    options = decide(request, chunk=chunk, memory=memory, plan=plan)
    joined = join(model, inputs, targets, options, apart=final_states or final_state_grad is not None)
    call = Call(model, joined.inputs, joined.targets, options, gathers=True, sink=sink, collect_in="reverse")
    call.require_something_to_differentiate()
    after: list[Any] = []
    initial_grads: list[Any] = []
    with one_thread_at_a_time(model):
        for index, gradient in enumerate(call.one_per_sequence(final_state_grad)):
            started = call.start(index)
            if gradient is not None:
                started.run.progress.expect(gradient)
            started.run.forward()
            if index == 0:
                call.refuse_gathered()
            initial_grads.append(started.reverse(everywhere(call.loss_grad)))
            after.append(started.run.progress.final_state)
        call.deliver(initial_grads)
    return joined.result(call.result(after, initial_grads))


def plan(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    memory: int | str | None = None,
    context: Any = None,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    state: Any = None,
    sink: Mapping[str, Sink] | None = None,
) -> Plan:
    """What `backward` would do with so much memory: the plan that it takes, and that `plan=` takes back.

    Nothing is computed but what must be measured; `.grad`, buffers and generators stay as they are.

    Args:
        model, inputs, targets, memory, context, schedule, loss_fn, state, sink: as in `backward`.

    Returns:
        A `Plan`: print it for its account and its reasons.

    Raises:
        InputError: an argument does not fit; the budget cannot be met: with the smallest that can; or there is none,
            and the system does not say how much is free.

    Cost: when the model is first used so, as much as a few thousand tokens forward and back; then next to nothing.

    Example:
        >>> print(plan(model, tokens, memory="1GiB"))
    """
    options = Options(context, DEFAULT_CHUNK, schedule, loss_fn or cross_entropy_sum, "targets", state, None)
    return make_plan(Request(model, inputs, targets, options, sink), memory)


@not_traced
def evaluate(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    context: Any = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    plan: Plan | None = None,
    loss_fn: LossFn | None = None,
    normalizer: Normalizer = "targets",
    state: Any = None,
    final_states: bool = False,
    on_chunk: OnChunk | None = None,
) -> Result:
    """The loss alone, forward only, in memory of one chunk's activations without a graph.

    The model runs in the mode it is in: call `model.eval()` first to turn dropout off. `torch.inference_mode` works.

    Args:
        model, inputs, targets, context, chunk, memory, plan, loss_fn, normalizer, state, final_states, on_chunk: as in
            `backward`.

    Returns:
        A `Result`, whose gradients are None.

    Raises: as `backward`, but for what compares two sweeps.

    Cost: one forward pass with its heads; memory of one chunk and one state.
    """
    options = Options(context, DEFAULT_CHUNK, None, loss_fn or cross_entropy_sum, normalizer, state, on_chunk)
    request = Request(model, inputs, targets, options, head=True, differentiates=False)
    options = decide(request, chunk=chunk, memory=memory, plan=plan)
    joined = join(model, inputs, targets, options, apart=final_states)
    call = Call(model, joined.inputs, joined.targets, options)
    after = [call.start(index, differentiates=False).run.forward(head=True) for index in range(len(call.sequences))]
    return joined.result(call.result(after, None))


@not_traced
def loss(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    context: Any = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    normalizer: Normalizer = "targets",
    state: Any = None,
    on_chunk: OnChunk | None = None,
) -> Tensor:
    """The loss as a scalar tensor: its `.backward()` runs the reverse sweep, from whatever gradient comes in.

    So loss scaling, gradient accumulation and further terms work as with any loss. Under `torch.no_grad()` it is a
    plain pass in chunks.

    Args:
        model, inputs, targets, context, chunk, memory, plan, schedule, loss_fn, normalizer, state, on_chunk: as in
            `backward`.

    Returns:
        The summed loss over the normaliser, 0-d. Gradients reach parameters, inputs, context and state.

    Raises:
        As `backward`, here or from `.backward()`; there also
        ConsumedError: it is the second one, or a parameter, an input or a state changed since the loss was computed.
        LossMismatchError: a chunk's loss comes out differently.

    Cost: as `backward`, and for the loss that is returned once more `loss_fn`, the last chunk, and the output head
    where `advance` would leave it out.
    """
    refuse_unsynchronised(model, through_autograd=True)
    options = Options(context, DEFAULT_CHUNK, schedule, loss_fn or cross_entropy_sum, normalizer, state, on_chunk)
    return _loss(model, inputs, targets, options, chunk=chunk, memory=memory, plan=plan)


def _loss(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    options: Options,
    *,
    chunk: int | None,
    memory: int | str | None,
    plan: Plan | None,
) -> Tensor:
    gathers = _wants_gradients()
    request = Request(model, inputs, targets, options, head=True, differentiates=gathers)
    options = decide(request, chunk=chunk, memory=memory, plan=plan)
    joined = join(model, inputs, targets, options)
    return loss_of(Call(model, joined.inputs, joined.targets, options, gathers=gathers))


@not_traced
def token_loss(
    model: nn.Module,
    inputs: Any,
    targets: Any = None,
    *,
    context: Any = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    loss_fn: LossFn | None = None,
    state: Any = None,
    on_chunk: OnChunk | None = None,
) -> Tensor | list[Tensor]:
    """Every token's loss, `[batch, time]`, differentiable: for weights, preferences, means per document.

    Args:
        model, inputs, targets, context, chunk, memory, plan, schedule, state, on_chunk: as in `backward`.
        loss_fn: (outputs, targets) -> `[batch, time]` of its chunk. Default: cross-entropy in nats.

    Returns:
        `[batch, time]`, by default zero where the target is ignored; for a list of sequences, a list of these.

    Raises: as `loss`. Cost: as `loss`, and one number per token with its gradient.
    """
    refuse_unsynchronised(model, through_autograd=True)
    options = Options(context, DEFAULT_CHUNK, schedule, loss_fn or token_cross_entropy, 1, state, on_chunk)
    request = Request(model, inputs, targets, options, head=True, differentiates=_wants_gradients(), per_token=True)
    options = decide(request, chunk=chunk, memory=memory, plan=plan)
    call = Call(model, inputs, targets, options, gathers=_wants_gradients(), per_token=True)
    losses = [along[0] for along in outputs_of(call)]
    return losses if call.is_list else losses[0]


@not_traced
def outputs(
    model: nn.Module,
    inputs: Any,
    *,
    context: Any = None,
    chunk: int | None = None,
    memory: int | str | None = None,
    plan: Plan | None = None,
    schedule: Schedule | None = None,
    state: Any = None,
    on_chunk: OnChunk | None = None,
) -> Any:
    """The model's outputs along the whole sequence, differentiable: for losses that belong to somebody else.

    Whatever is computed from them (a loss over the last step, a mean per document, a preference between two sequences)
    is ordinary PyTorch; its `.backward()` runs the reverse sweep. Memory: the outputs and their gradient, linear in the
    length and as wide as they are; where only a loss is wanted, `backward` and `loss` hold nothing per token. A second
    `.backward()` is refused. Under `torch.no_grad()` it is a plain pass in chunks.

    Args:
        model, inputs, context, chunk, memory, plan, schedule, state, on_chunk: as in `backward`.

    Returns:
        What `forward` returns as its outputs: a tensor `[batch, time, ...]`, or a tree of them; for a list of
        sequences, a list. Gradients reach parameters, inputs, context and state.

    Raises:
        ModelError: an output is no tensor with a time axis, or comes in another shape or dtype in a later chunk.
        Otherwise as `loss`.

    Cost: as `loss`, and the outputs with their gradient.

    Example:
        >>> hidden = outputs(model, tokens, chunk=1024)    # tokens: [1, 1_000_000]
        >>> classifier(hidden[:, -1]).logsumexp(-1).sum().backward()
    """
    refuse_unsynchronised(model, through_autograd=True)
    gathers = torch.is_grad_enabled()
    options = Options(context, DEFAULT_CHUNK, schedule, None, 1, state, on_chunk)
    request = Request(model, inputs, None, options, head=True, differentiates=gathers)
    call = Call(model, inputs, None, decide(request, chunk=chunk, memory=memory, plan=plan), gathers=gathers)
    trees = [one.outputs_of(along) for one, along in zip(call.sequences, outputs_of(call), strict=True)]
    return trees if call.is_list else trees[0]


def _wants_gradients() -> bool:
    """Whether a call should be ready for a backward; within `torch.inference_mode` it is then refused."""
    return torch.is_grad_enabled() or torch.is_inference_mode_enabled()


class Chunked(nn.Module):
    """A module that returns the loss of a causal model, computed chunk by chunk: what data parallelism wraps.

    `DistributedDataParallel(Chunked(model, chunk=4096))` synchronises each parameter once per step, after the last
    chunk. With unequal target counts per process, pass `normalizer=total_targets / world_size` to `forward`.

    Args:
        model: a causal model.
        chunk, memory, plan, schedule, loss_fn: as in `backward`.

    Raises:
        ModelError: the model has no `initial_state`, or is itself wrapped or sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int | None = None,
        memory: int | str | None = None,
        plan: Plan | None = None,
        schedule: Schedule | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        super().__init__()
        self.model = require_causal_model(model)
        self.chunk, self.memory, self.plan = chunk, memory, plan
        self.schedule, self.loss_fn = schedule, loss_fn

    @not_traced
    def forward(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        context: Any = None,
        normalizer: Normalizer = "targets",
        state: Any = None,
    ) -> Tensor:
        """The loss, 0-d, as `slimgrad.loss` returns it; its arguments, errors and cost are that function's."""
        loss_fn = self.loss_fn or cross_entropy_sum
        options = Options(context, DEFAULT_CHUNK, self.schedule, loss_fn, normalizer, state, None)
        return _loss(self.model, inputs, targets, options, chunk=self.chunk, memory=self.memory, plan=self.plan)

    def extra_repr(self) -> str:
        """The knobs, for `print`."""
        knobs = {name: getattr(self, name) for name in ("chunk", "memory", "plan", "schedule")}
        return ", ".join(f"{name}={value!r}" for name, value in knobs.items() if value is not None)
