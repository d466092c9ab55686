"""One call: its arguments checked and made uniform, its sequences started, its gradients handed out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from slimgrad.budget.plan import Plan
from slimgrad.call.additive import SumCheck
from slimgrad.call.cudagraphs import refuse_cuda_graphs
from slimgrad.call.model import SharedModel
from slimgrad.call.program import ChunkProgram, LossFn, sum_dtype
from slimgrad.call.protocol import of_another_batch, refuse_another_batch, require_causal_model
from slimgrad.call.source import SequenceData
from slimgrad.errors import InputError, ModelError
from slimgrad.gradients.buffers import Gather
from slimgrad.gradients.sink import Sink
from slimgrad.states import raw_tensor
from slimgrad.states.base import Root, State
from slimgrad.sweep import tree
from slimgrad.sweep.moves import Moves
from slimgrad.sweep.program import OnChunk, refuse_nesting
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.random import derive_seed, draw_seed, in_turn
from slimgrad.sweep.run import Cotangents, Run
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.schedules.default import choose_schedule

logger = logging.getLogger("slimgrad")
INITIAL = "the initial state"
DEFAULT_CHUNK = 4096  # tokens

Normalizer = Literal["targets"] | float | int | Tensor


class Options(NamedTuple):
    """What the public functions take beside model, inputs and targets (see `api.backward`)."""

    context: Any
    chunk: int
    schedule: Schedule | None
    loss_fn: LossFn | None
    normalizer: Normalizer
    state: Any
    on_chunk: OnChunk | None
    plan: Plan | None = None  # what a budget bought, where chunk and schedule come from one


class NotKept:
    """In the place of what was not kept of a list of documents."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What a call found. For a list of sequences, the last three are lists.

    Of documents that went through together there are no states: reading the two raises `InputError`. A call with
    `final_states=True` keeps them.

    Attributes:
        loss: summed loss over the normaliser, a 0-d tensor without a graph; by default in nats per target.
        num_targets: targets that are not ignored, over all sequences.
        metrics: by name, the sums of what `loss_fn` returned beside "loss"; over no normaliser.
        schedule: the schedule that was used.
        plan: what the budget bought; None where `chunk` was named, or one chunk was enough.
        final_state: the state after the last token, without a graph; hand it to the next call.
        initial_state_grad: the gradient of the initial state: its tree, with a tensor (or None: zero) for each leaf.
        input_grads: the gradient of the inputs that require one, in the inputs' tree; None elsewhere.
    """

    loss: Tensor
    num_targets: int
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    schedule: Schedule | None = None
    plan: Plan | None = None
    final_state: Any = field(default=None, repr=False)
    initial_state_grad: Any = field(default=None, repr=False)
    input_grads: Any = None

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if found is NotKept:
            raise InputError(
                f"{name}: documents of a list go through together, and what their states are after them is not kept; "
                "expected final_states=True in the call, which runs each document by itself"
            )
        return found


@dataclass
class Started:
    """One sequence of a call, its initial state made and its run ready.

    Attributes:
        run: over its chunks.
        program: the chunks.
        made: the leaves of an initial state that the model made, with their graph; empty for a state that was passed.
    """

    run: Run
    program: ChunkProgram
    made: list[Tensor | None]

    def reverse(self, cotangents: Cotangents) -> Any:
        """The reverse sweep, and on into whatever the initial state was made of."""
        adjoint = self.run.reverse(cotangents)
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

    @in_turn  # what is noted of the model must not be another thread's stand-ins
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
        refuse_cuda_graphs(self.model, options.loss_fn)
        chunk = options.chunk
        if isinstance(chunk, bool) or not isinstance(cast(object, chunk), int) or chunk < 1:
            raise InputError(f"chunk={chunk!r}: expected a whole number of tokens, at least 1")
        self._options, self._schedule, self.context = options, options.schedule, options.context
        self.plan = options.plan
        self.is_list = isinstance(inputs, list)
        self._given = cast("list[Any]", inputs) if self.is_list else [inputs]
        if not self._given:
            raise InputError("inputs is an empty list: expected at least one sequence")
        goals = self.one_per_sequence(targets)
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
        self.gather = Gather(self._parameters, sink) if gathers else None
        self.shared = SharedModel(self.model, self.gather, options.context)
        seed = draw_seed()
        by_targets = isinstance(options.normalizer, str)
        self._sums = SumCheck(options.loss_fn, self.shared.devices, by_targets=by_targets)
        self.sequences = [
            self._sequence(one, goal, derive_seed(seed, index), index, collect_in, per_token)
            for index, (one, goal) in enumerate(zip(self._given, goals, strict=True))
        ]
        self._sums.chunks = sum(len(one.cut) for one in self.sequences)
        held = [x.whole for one in self.sequences for x in (one.data.inputs, one.data.targets) if x is not None]
        self.given = tree.tensors([held, options.context])  # what takes no gradient may change as well
        self._refuse_tangents([*self.given, *tree.tensors(list(map(tree.leaves, self._states))), *model.parameters()])
        self._normalizer = _checked(options.normalizer)

    @staticmethod
    def _refuse_tangents(given: list[Tensor]) -> None:
        level = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
        if level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
            raise InputError(
                "a parameter, an input, the context or the state has a tangent (forward-mode differentiation), which "
                "chunks do not carry on: it would be lost. Use plain forward-mode differentiation of the whole "
                "sequence, or the gradient: slimgrad.backward"
            )

    def _sequence(
        self, inputs: Any, targets: Any, seed: int, index: int, collect_in: str, per_token: bool
    ) -> ChunkProgram:
        loss_fn = self._options.loss_fn
        try:
            return ChunkProgram(
                self.shared,
                SequenceData(inputs, targets, self.shared.device, has_targets=loss_fn is not None),
                chunk=self._options.chunk,
                seed=seed,
                loss_fn=loss_fn,
                per_token=per_token,
                collect_in=collect_in,
                sums=self._sums,
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
        expected = len(self._given)
        if value is None:
            return [None] * expected
        if not isinstance(value, list) or len(cast("list[Any]", value)) != expected:
            came = f"a list of {len(cast('list[Any]', value))}" if isinstance(value, list) else type(value).__name__
            raise InputError(f"inputs is a list of {expected} sequences: expected a list of {expected}, got {came}")
        return cast("list[Any]", value)

    @cached_property
    def num_targets(self) -> int:
        """Over all sequences; those of readers are counted in the first sweep, and what is missing is read."""
        return sum(one.num_targets for one in self.sequences)

    @cached_property
    def loss_grad(self) -> Tensor:
        """The cotangent of every chunk's loss: 0-d, one over the normaliser."""
        number = self._normalizer if self._normalizer is not None else max(self.num_targets, 1)
        device = self.shared.device
        return torch.tensor(1.0 / number, dtype=sum_dtype(device), device=device)

    @property
    def schedule(self) -> Schedule:
        """The one that was named, or chosen when the first sequence was started."""
        assert self._schedule is not None
        return self._schedule

    def start(self, index: int, *, differentiates: bool = True, to_end: bool = False) -> Started:
        """Make the initial state of sequence `index`, and a run over it."""
        program, state = self.sequences[index], self._states[index]
        made: list[Tensor | None] = []
        if state is None:
            state, made = self.initial_state(program)
        elif of_another_batch(state, program.batch):
            with torch.no_grad():
                refuse_another_batch(state, self.initial_state(program)[0], program.batch)
        if self._schedule is None and differentiates:
            self._schedule, reason = self._choose_schedule(state)
            logger.info("schedule: %s", reason)
        moves = Moves(program.cut, self._schedule if differentiates else None, to_end=to_end)
        parts = {"collected": program.collected} | ({} if self.gather is None else {"gathered": self.gather})
        plan = None if self.plan is None else self.plan.to_dict()
        progress = Progress(state, moves, seed=program.seed, parts=parts, plan=plan)
        return Started(
            Run(program, progress, on_chunk=self._options.on_chunk, differentiates=differentiates), program, made
        )

    def initial_state(self, program: ChunkProgram) -> tuple[Any, list[Tensor | None]]:
        """The state that the model makes, and its tensors with their graph."""
        with (
            program.chunk_context(-1),
            self.shared.autocast(as_called=True),
            torch.set_grad_enabled(self.gather is not None),
        ):
            state = cast(Any, self.model).initial_state(program.batch)
        made = [raw_tensor(leaf) for leaf in tree.leaves(state)]
        if self.gather is not None:
            self.shared.refuse_lost([x for x in made if x is not None], [], INITIAL)
        return state, made

    def _choose_schedule(self, state: Any) -> tuple[Schedule, str]:
        plain_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tree.tensors(state))
        state_bytes = sum(leaf.kept_bytes() for leaf in tree.leaves(state) if isinstance(leaf, State))
        return choose_schedule(plain_bytes, state_bytes, max(len(one.cut) for one in self.sequences))

    def require_something_to_differentiate(self) -> None:
        """Refuse a reverse sweep that could only find zeros."""
        if not self._parameters and not self.takers():
            raise InputError(
                "nothing requires a gradient: expected trainable parameters, or inputs, context or state with "
                "requires_grad. For the loss alone use slimgrad.evaluate"
            )

    def refuse_gathered(self) -> None:
        """Refuse a model that ran a backward pass of its own into its parameters, on the way forward."""
        if self.gather is not None and not self.gather.is_empty:
            raise ModelError(
                "a .backward() within forward added gradients to the model's parameters. Each chunk runs twice, so "
                "they would be added twice; expected forward to leave .grad alone. Use torch.autograd.grad for "
                "gradients that the model takes itself, or run that backward pass outside of it"
            )

    def takers(self) -> list[Tensor]:
        """Every tensor whose gradient the caller may ask for: parameters, inputs, context, state."""
        return [*self._parameters.values(), *self._others()]

    def _others(self) -> list[Tensor]:
        inputs = [x for one in self.sequences for x in one.inputs_with_gradients()]
        states = [raw_tensor(leaf) for leaf in tree.leaves(self._states)]
        rest = [*tree.tensors(self._options.context), *states]
        return [*inputs, *(x for x in rest if x is not None and x.requires_grad)]

    def _gradients_of_others(self, initial_grads: list[Any]) -> list[Tensor | None]:
        """In the order of `_others`."""
        inputs = [g for one in self.sequences for g in one.collected.input_grads if g is not None]
        context = [leaf.grad for leaf in self.shared.context_leaves]
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
        assert self.gather is not None
        return [*self.gather.take().values(), *self._gradients_of_others(initial_grads)]

    def deliver(self, initial_grads: list[Any]) -> None:
        """Pass the gathered gradients on to parameters, inputs, context and given states, each once."""
        assert self.gather is not None
        gradients = self._gradients_of_others(initial_grads)
        self.gather.deliver([(x, g) for x, g in zip(self._others(), gradients, strict=True) if g is not None])

    def total_loss(self) -> Tensor:
        """The loss over all sequences, over the normaliser, in the dtype that the chunks' losses have."""
        total = torch.stack([one.collected.loss_sum for one in self.sequences]).sum()
        return (total * self.loss_grad.to(total.dtype)).to(self.sequences[0].collected.loss_dtype)

    def result(self, final_states: list[Any], initial_grads: list[Any] | None) -> Result:
        """Add the sequences up."""
        metrics: dict[str, Tensor] = {}
        for one in self.sequences:
            for name, value in one.collected.metrics.items():
                metrics[name] = metrics[name] + value if name in metrics else value

        def as_given(items: list[Any] | None) -> Any:
            return items if self.is_list or items is None else items[0]

        return Result(
            loss=self.total_loss(),
            num_targets=self.num_targets,
            metrics=metrics,
            schedule=self._schedule,
            plan=self.plan,
            final_state=as_given(final_states),
            initial_state_grad=as_given(initial_grads),
            input_grads=None if initial_grads is None else as_given([one.input_grads for one in self.sequences]),
        )


def _checked(normalizer: Normalizer) -> float | None:
    """The number to divide by; None for that of the targets."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise InputError(f"normalizer: expected one number, got a tensor of shape {list(normalizer.shape)}")
        if normalizer.requires_grad:
            raise InputError("normalizer: expected a constant, got a tensor that requires a gradient; detach it")
        normalizer = float(normalizer.detach())
    if isinstance(normalizer, str) and normalizer == "targets":
        return None
    if not isinstance(cast(object, normalizer), Real):
        raise InputError(f"normalizer={normalizer!r}: expected 'targets', a number or a tensor")
    if not normalizer > 0:
        raise InputError(f"normalizer={normalizer}: expected a positive number")
    return float(normalizer)
