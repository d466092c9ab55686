"""One call of the face: its arguments checked and made uniform, its sequences started, its gradients handed out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from slimgrad.budget import choose_schedule
from slimgrad.chunks import ChunkedSequence, LossFn, SharedModel, sum_dtype
from slimgrad.errors import ConsumedError, InputError, ModelError
from slimgrad.guard import CalledWith
from slimgrad.losses import count_targets
from slimgrad.parallel import one_thread_at_a_time
from slimgrad.protocol import require_causal_model
from slimgrad.sweep import tree
from slimgrad.sweep.accumulator import kept_bytes
from slimgrad.sweep.carriers import Root
from slimgrad.sweep.carriers.plain import version
from slimgrad.sweep.gather import Gather, Sink
from slimgrad.sweep.random import derive_seed, draw_seed
from slimgrad.sweep.run import Event, Run, refuse_nesting
from slimgrad.sweep.schedule import Schedule
from slimgrad.sweep.state import Growing, PrefixSum

logger = logging.getLogger("slimgrad")
INITIAL = "the initial state"

Normalizer = Literal["targets"] | float | int | Tensor
OnChunk = Callable[[Event], None]


class Options(NamedTuple):
    """What every function of the face takes beside model, inputs and targets (see `api.backward`)."""

    context: Any
    chunk: int
    schedule: Schedule | None
    loss_fn: LossFn
    normalizer: Normalizer
    state: Any
    on_chunk: OnChunk | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call found. For a list of sequences, the last three are lists.

    Attributes:
        loss: summed loss over the normaliser, a 0-d tensor without a graph.
        num_targets: targets that are not ignored, over all sequences.
        metrics: the sums of what `loss_fn` returned beside "loss".
        schedule: the schedule that was used.
        final_state: the state after the last token, without a graph; hand it to the next call.
        initial_state_grad: the gradient of the initial state: its tree, with a tensor (or None: zero) for each leaf.
        input_grads: the gradient of the inputs that require one, in the inputs' tree; None elsewhere.
    """

    loss: Tensor
    num_targets: int
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    schedule: Schedule | None = None
    final_state: Any = None
    initial_state_grad: Any = None
    input_grads: Any = None


@dataclass
class Started:
    """One sequence of a call, its initial state made and its run ready.

    `made` holds the leaves of an initial state that the model made, with their graph; it is empty for a state that the
    caller passed.
    """

    run: Run
    program: ChunkedSequence
    made: list[Tensor | None]

    def reverse(self, loss_grad: Tensor | Callable[[int], Tensor | None], final_state_grad: Any = None) -> Any:
        """The reverse sweep, and on into whatever the initial state was made of."""
        adjoint = self.run.reverse(loss_grad, final_state_grad)
        roots = [
            Root(leaf, g)
            for leaf, g in zip(self.made, tree.leaves(adjoint), strict=False)
            if leaf is not None and g is not None and leaf.requires_grad
        ]
        if roots:
            with self.program.chunk_context(-1):
                self.program.shared.backward(roots, [], INITIAL)
        return adjoint


class Call:
    """A list of sequences, one model, one normaliser, one schedule.

    Args:
        model, inputs, targets, options: as the caller gave them.
        gathers: whether gradients are wanted.
        sink: by name, what takes a parameter's gradients instead of a buffer.
        collect_in: the sweep in which losses are noted.
        per_token: one loss per token.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any,
        options: Options,
        *,
        gathers: bool = False,
        sink: Mapping[str, Sink] | None = None,
        collect_in: str = "forward",
        per_token: bool = False,
    ) -> None:
        refuse_nesting()
        if gathers and torch.is_inference_mode_enabled():
            raise InputError(
                "a gradient was asked for inside torch.inference_mode, where tensors keep no graph; expected to be "
                "called outside of it. For the loss alone use slimgrad.evaluate"
            )
        self.model = require_causal_model(model)
        chunk = options.chunk
        if isinstance(chunk, bool) or not isinstance(cast(object, chunk), int) or chunk < 1:
            raise InputError(f"chunk={chunk!r}: expected a whole number of tokens, at least 1")
        self._options, self._schedule, self._per_token = options, options.schedule, per_token
        self.is_list = isinstance(inputs, list)
        self._inputs = [_batched(item) for item in (cast("list[Any]", inputs) if self.is_list else [inputs])]
        if not self._inputs:
            raise InputError("inputs is an empty list: expected at least one sequence")
        goals = [_batched(item) for item in self.one_per_sequence(targets)]
        self.given = tree.tensors([self._inputs, goals, options.context])  # what takes no gradient may change as well
        self._states = self.one_per_sequence(options.state)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        unknown = sorted({*(sink or {})} - self._parameters.keys())
        if unknown:
            raise InputError(f"sink: expected names of trainable parameters, got {', '.join(unknown)}")
        if gathers and any(x.requires_grad for x in tree.tensors(goals)):
            raise InputError(
                "targets require gradients, which nobody would receive; expected constants. Detach them, or pass them "
                "among the inputs and read them in loss_fn from the outputs"
            )
        self._gather = Gather(self._parameters, sink) if gathers else None
        self._shared = SharedModel(self.model, self._gather, options.context)
        self._seed = draw_seed()
        self.sequences = [
            self._sequence(one, goal, index, collect_in)
            for index, (one, goal) in enumerate(zip(self._inputs, goals, strict=True))
        ]
        self.num_targets = sum(
            one.batch * (one.time - 1) if goal is None else count_targets(goal, one.batch, one.time)
            for one, goal in zip(self.sequences, goals, strict=True)
        )
        reciprocal = _reciprocal(options.normalizer, self.num_targets)
        self.loss_grad = torch.tensor(reciprocal, dtype=sum_dtype(self._shared.device), device=self._shared.device)

    def _sequence(self, inputs: Any, targets: Any, index: int, collect_in: str) -> ChunkedSequence:
        try:
            return ChunkedSequence(
                self._shared,
                inputs,
                targets,
                chunk=self._options.chunk,
                seed=derive_seed(self._seed, index),
                loss_fn=self._options.loss_fn,
                per_token=self._per_token,
                collect_in=collect_in,
            )
        except InputError as error:
            if not self.is_list:
                raise
            raise InputError(
                f"sequence {index} of the list: {error}. Leave empty documents out, with their targets and states"
            ) from None

    def one_per_sequence(self, value: Any) -> list[Any]:
        """An argument as a list along the sequences."""
        if not self.is_list:
            return [value]
        expected = len(self._inputs)
        if value is None:
            return [None] * expected
        if not isinstance(value, list) or len(cast("list[Any]", value)) != expected:
            came = f"a list of {len(cast('list[Any]', value))}" if isinstance(value, list) else type(value).__name__
            raise InputError(f"inputs is a list of {expected} sequences: expected a list of {expected}, got {came}")
        return cast("list[Any]", value)

    def start(self, index: int, *, verify_bits: bool = True) -> Started:
        """Make the initial state of sequence `index`, and a run over it."""
        program, state = self.sequences[index], self._states[index]
        made: list[Tensor | None] = []
        if state is None:
            with (
                program.chunk_context(-1),
                self._shared.autocast(as_called=True),
                torch.set_grad_enabled(self._gather is not None),
            ):
                state = cast(Any, self.model).initial_state(program.batch)
            made = [raw_tensor(leaf) for leaf in tree.leaves(state)]
            if self._gather is not None:
                self._shared.refuse_lost([x for x in made if x is not None], [], INITIAL)
        if self._schedule is None:
            plain_bytes = sum(leaf.nbytes for leaf in tree.tensors(state))
            sums = [leaf for leaf in tree.leaves(state) if isinstance(leaf, PrefixSum)]
            sum_bytes = sum(kept_bytes(leaf.shape, leaf.dtype) for leaf in sums)
            longest = max(one.num_chunks for one in self.sequences)
            self._schedule, reason = choose_schedule(plain_bytes, sum_bytes, longest)
            logger.info("schedule: %s", reason)
        run = Run(
            program, state, schedule=self._schedule, verify_bits=verify_bits, on_chunk=self._options.on_chunk
        )  # fmt: skip
        return Started(run, program, made)

    def require_something_to_differentiate(self) -> None:
        """Refuse a reverse sweep that could only find zeros."""
        if not self._parameters and not self.takers():
            raise InputError(
                "nothing requires a gradient: expected trainable parameters, or inputs, context or state with "
                "requires_grad. For the loss alone use slimgrad.evaluate"
            )

    def refuse_gathered(self) -> None:
        """Refuse a model that ran a backward pass of its own into its parameters, on the way forward."""
        if self._gather is not None and not self._gather.is_empty:
            raise ModelError(
                "a .backward() within forward added gradients to the model's parameters. Each chunk runs twice, so "
                "they would be added twice; expected forward to leave .grad alone. Use torch.autograd.grad for "
                "gradients that the model takes itself, or run that backward pass outside of it"
            )

    def takers(self) -> list[Tensor]:
        """Every tensor whose gradient the caller may ask for: parameters, inputs, context, state."""
        return [*self._parameters.values(), *self._others()]

    def _others(self) -> list[Tensor]:
        states = [raw_tensor(leaf) for leaf in tree.leaves(self._states)]
        rest = [*tree.tensors(self._inputs), *tree.tensors(self._options.context), *states]
        return [x for x in rest if x is not None and x.requires_grad]

    def _gradients_of_others(self, initial_grads: list[Any]) -> list[Tensor | None]:
        """In the order of `_others`."""
        inputs = [g for one in self.sequences for g in tree.leaves(one.input_grads) if g is not None]
        context = [leaf.grad for leaf in self._shared.context_leaves]
        states = [
            g
            for given, found in zip(self._states, initial_grads, strict=True)
            if given is not None  # a state that the model made has handed its gradient on already
            for x, g in zip(map(raw_tensor, tree.leaves(given)), tree.leaves(found), strict=True)
            if x is not None and x.requires_grad
        ]
        return [*inputs, *context, *states]

    def gradients(self, initial_grads: list[Any]) -> list[Tensor | None]:
        """The gradients of `takers`, in their order; the buffers are given away."""
        assert self._gather is not None
        return [*self._gather.take().values(), *self._gradients_of_others(initial_grads)]

    def deliver(self, initial_grads: list[Any]) -> None:
        """Pass the gathered gradients on to parameters, inputs, context and given states, each once."""
        assert self._gather is not None
        gradients = self._gradients_of_others(initial_grads)
        self._gather.deliver([(x, g) for x, g in zip(self._others(), gradients, strict=True) if g is not None])

    def total_loss(self) -> Tensor:
        """The loss over all sequences, over the normaliser, in the dtype that the chunks' losses have."""
        total = torch.stack([one.loss_sum for one in self.sequences]).sum()
        return (total * self.loss_grad.to(total.dtype)).to(self.sequences[0].loss_dtype)

    def result(self, final_states: list[Any], initial_grads: list[Any] | None) -> Result:
        """Add the sequences up."""
        metrics: dict[str, Tensor] = {}
        for one in self.sequences:
            for name, value in one.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value

        def shown(items: list[Any] | None) -> Any:
            return items if self.is_list or items is None else items[0]

        return Result(
            loss=self.total_loss(),
            num_targets=self.num_targets,
            metrics=metrics,
            schedule=self._schedule,
            final_state=shown(final_states),
            initial_state_grad=shown(initial_grads),
            input_grads=None if initial_grads is None else shown([one.input_grads for one in self.sequences]),
        )


def differentiable_losses(call: Call) -> tuple[Tensor, ...]:
    """The loss of a call (or every sequence's token losses) as tensors whose backward is the reverse sweep."""
    return cast("tuple[Tensor, ...]", _ChunkedLoss.apply(call, *call.takers()))


class _ChunkedLoss(torch.autograd.Function):
    """The forward sweep as forward, the reverse sweep as backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: Call, *takers: Tensor) -> tuple[Tensor, ...]:
        context = cast(Any, ctx)
        with one_thread_at_a_time(call.model):
            context.started = [call.start(index) for index in range(len(call.sequences))]
            for one in context.started:
                one.run.forward(losses=True)
            call.refuse_gathered()
        context.call, context.called_with = call, CalledWith(call.model)
        ctx.save_for_backward(*takers)  # so that a change before backward is noticed
        given = [*call.given, *call.model.buffers(), *(p for p in call.model.parameters() if not p.requires_grad)]
        context.versions = [(x, version(x)) for x in given]
        token_losses = [one.token_losses for one in call.sequences]
        return tuple(x for x in token_losses if x is not None) or (call.total_loss(),)

    @staticmethod
    @once_differentiable  # a second derivative (create_graph=True, then differentiated) raises
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        context = cast(Any, ctx)
        call = cast("Call | None", context.call)
        if call is None:
            raise ConsumedError(
                "backward was called a second time on one chunked loss, whose states went with the first. Expected one "
                "backward per loss: add losses up before calling it, or compute the loss again"
            )
        _require_unchanged(context)
        started, called_with = cast("list[Started]", context.started), cast(CalledWith, context.called_with)
        context.call = context.started = context.called_with = context.versions = (
            None  # a loss that is kept holds nothing
        )
        initial_grads: list[Any] = []
        with one_thread_at_a_time(call.model), called_with.restored():
            for index, one in enumerate(started):
                if one.program.token_losses is None:
                    initial_grads.append(one.reverse(grad_outputs[0] * call.loss_grad))
                else:
                    initial_grads.append(one.reverse(one.program.slicer(grad_outputs[index])))
        return None, *call.gradients(initial_grads)


def _require_unchanged(context: Any) -> None:
    """torch itself notices that a saved tensor was written to, when it is asked for; say what that means here."""
    cause = None
    try:
        _ = context.saved_tensors
    except RuntimeError as error:
        cause = error
    if cause or any(version(x) != before for x, before in context.versions):
        raise ConsumedError(
            "a parameter, an input, a target or a state was modified between the loss and its backward, so the chunks "
            "cannot be rebuilt as they were. Expected backward before optimizer.step(), and before buffers are reused"
        ) from cause


def _reciprocal(normalizer: Normalizer, num_targets: int) -> float:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise InputError(f"normalizer: expected one number, got a tensor of shape {list(normalizer.shape)}")
        if normalizer.requires_grad:
            raise InputError("normalizer: expected a constant, got a tensor that requires a gradient; detach it")
        normalizer = float(normalizer.detach())
    if isinstance(normalizer, str):
        if normalizer != "targets":
            raise InputError(f"normalizer={normalizer!r}: expected 'targets', a number or a tensor")
        return 1.0 / max(num_targets, 1)
    if not normalizer > 0:
        raise InputError(f"normalizer={normalizer}: expected a positive number")
    return 1.0 / normalizer


def _batched(item: Any) -> Any:
    """1-D tensors stand for a batch of one."""
    return tree.map_tensors(lambda x: x[None] if x.dim() == 1 else x, item)


def raw_tensor(leaf: Any) -> Tensor | None:
    """The tensor behind a leaf of a state."""
    if isinstance(leaf, PrefixSum | Growing):
        return leaf.value
    return leaf if isinstance(leaf, Tensor) else None
