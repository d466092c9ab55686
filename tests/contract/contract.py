"""The contract: whatever slimgrad computes chunk by chunk equals plain backpropagation, written out here by hand.

Nothing of slimgrad takes part in the truth: the model is called once on the whole sequence, torch's cross-entropy is
added up, autograd goes back. Between the two stands the specification, `sweep/algorithm1.py`: the same chunks without
schedules, carriers, exact sums and gathered gradients. Where the three differ, it says on which side the mistake is.
`check` and `check_carried` raise AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.sweep import algorithm1

Gradients = dict[str, Tensor]

# Measured over all cases, chunks, schedules and ways: at most 5e-15 for any one gradient.
TOLERANCE = 1e-12
WAYS = ("backward", "loss", "token_loss", "outputs", "Chunked")


def raw(leaf: Any) -> Tensor | None:
    """The tensor behind a leaf of a state."""
    return leaf.value if isinstance(leaf, sg.PrefixSum | sg.Growing) else leaf if isinstance(leaf, Tensor) else None


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def fresh(inputs: Any) -> Any:
    """Inputs whose floating tensors are leaves that take gradients."""
    return pytree.tree_map(lambda x: x.detach().clone().requires_grad_() if is_floating(x) else x, inputs)


def fresh_state(state: Any) -> Any:
    """The state without its graph, its floating tensors leaves that take gradients."""

    def leaf(x: Any) -> Any:
        value = raw(x)
        if value is None:
            return x
        value = value.detach().clone().requires_grad_(value.is_floating_point())
        return type(x)(value) if isinstance(x, sg.PrefixSum | sg.Growing) else value

    return pytree.tree_map(leaf, state)


def batch_size(inputs: Any) -> int:
    return pytree.tree_leaves(inputs)[0].shape[0]


def length(inputs: Any) -> int:
    return pytree.tree_leaves(inputs)[0].shape[1]


def between(inputs: Any, start: int, stop: int) -> Any:
    """Inputs or targets from one token to another."""
    return pytree.tree_map(lambda x: x[:, start:stop], inputs)


def spans(time: int, chunk: int) -> list[tuple[int, int]]:
    """Where chunks begin and end: a remainder of one token joins the chunk before it."""
    starts = list(range(0, time, chunk))
    if len(starts) > 1 and chunk > 1 and time - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, time]))


def explicit(inputs: Any, targets: Tensor | None) -> Tensor:
    """The targets, next tokens written out."""
    return F.pad(inputs[:, 1:], (0, 1), value=-100) if targets is None else targets


def plain_loss(outputs: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Summed cross-entropy over `count`, or else over the number of targets that count."""
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / max(int((targets != -100).sum()) if count is None else count, 1)


def collect(model: nn.Module, inputs: Any, state_gradients: Any) -> Gradients:
    """Every gradient by name, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found |= {f"input {i}": x.grad for i, x in enumerate(pytree.tree_leaves(inputs)) if is_floating(x)}
    states = enumerate(pytree.tree_leaves(state_gradients))
    return found | {f"state {i}": g for i, g in states if isinstance(g, Tensor) and g.numel()}


def cotangent_for(state: Any) -> Any:
    """A random gradient of a state: a tensor for each floating leaf, else None."""

    def leaf(x: Any) -> Tensor | None:
        value = raw(x)
        return torch.randn_like(value) if is_floating(value) else None

    return pytree.tree_map(leaf, state)


def plain(
    model: nn.Module, inputs: Any, targets: Any, *, state: Any = None, final_gradient: Any = None
) -> tuple[Tensor, Gradients]:
    """Loss and gradients of one call over the whole sequence, by autograd."""
    inputs = fresh(inputs)
    state = model.initial_state(batch_size(inputs)) if state is None else state
    leaves = [raw(leaf) for leaf in pytree.tree_leaves(state)]
    for x in leaves:
        if is_floating(x):
            (x.retain_grad if x.requires_grad else x.requires_grad_)()
    outputs, final = model(inputs, state)
    loss = plain_loss(outputs, explicit(inputs, targets))
    total = loss
    if final_gradient is not None:
        for end, gradient in zip(pytree.tree_leaves(final), pytree.tree_leaves(final_gradient), strict=True):
            if gradient is not None:
                total = total + (raw(end) * gradient).sum()
    total.backward()
    return loss.detach(), collect(model, inputs, [None if x is None else x.grad for x in leaves])


def chunked(
    way: str, model: nn.Module, inputs: Any, targets: Any, *, chunk: int, schedule: Any = None, state: Any = None
) -> tuple[Tensor, Gradients]:
    """The same by slimgrad."""
    inputs = fresh(inputs)
    if way == "backward":
        result = sg.backward(model, inputs, targets, chunk=chunk, schedule=schedule, state=state)
        return result.loss, collect(model, inputs, result.initial_state_grad)
    if way == "loss":
        loss = sg.loss(model, inputs, targets, chunk=chunk, schedule=schedule, state=state)
    elif way == "token_loss":
        each = sg.token_loss(model, inputs, targets, chunk=chunk, schedule=schedule, state=state)
        loss = each.sum() / int((explicit(inputs, targets) != -100).sum())
    elif way == "outputs":
        loss = plain_loss(
            sg.outputs(model, inputs, chunk=chunk, schedule=schedule, state=state), explicit(inputs, targets)
        )
    else:
        loss = sg.Chunked(model, chunk=chunk, schedule=schedule)(inputs, targets, state=state)
    loss.backward()
    leaves = [raw(leaf) for leaf in pytree.tree_leaves(state)]
    return loss.detach(), collect(model, inputs, [None if x is None else x.grad for x in leaves])


def specified(
    model: nn.Module, inputs: Any, targets: Any, *, chunk: int, state: Any = None
) -> tuple[Tensor, Gradients]:
    """The same by Algorithm 1 as the paper states it."""
    targets = explicit(inputs, targets)
    count = int((targets != -100).sum())
    state = model.initial_state(batch_size(inputs)) if state is None else state
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def step(chunk: Any, state: Any) -> tuple[Tensor, Any]:
        outputs, following = model(chunk[0], state)
        return plain_loss(outputs, chunk[1], count), following

    loss, of_parameters, of_inputs, of_state = algorithm1.gradients(
        step,
        [(between(inputs, *span), between(targets, *span)) for span in spans(length(inputs), chunk)],
        state,
        [*parameters.values()],
    )
    floating = [f"input {i}" for i, x in enumerate(pytree.tree_leaves(inputs)) if is_floating(x)]
    found = dict(zip(parameters, of_parameters, strict=True))
    found |= {name: torch.cat(pieces, 1) for name, *pieces in zip(floating, *of_inputs, strict=True)}
    floating = [f"state {i}" for i, x in enumerate(pytree.tree_leaves(state)) if is_floating(raw(x))]
    return loss, found | {name: g for name, g in zip(floating, of_state, strict=True) if g.numel()}


def worst_error(got: Gradients, expected: Gradients) -> tuple[float, str]:
    """The largest ||difference|| / max(||expected||, 1e-6 ||all expected||), and whose it is."""
    every = sum(float(g.double().norm()) ** 2 for g in expected.values()) ** 0.5
    errors = {}
    for name in {*got, *expected}:
        a, b = (side.get(name, torch.zeros(())).double() for side in (got, expected))
        errors[name] = float((a - b).norm()) / max(float(b.norm()), 1e-6 * every, 1e-300)
    name = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[name], name


def global_error(got: Gradients, expected: Gradients) -> float:
    """||all differences|| / ||all expected||."""
    differences = sum(float((got[name].double() - g.double()).norm()) ** 2 for name, g in expected.items())
    return (differences / sum(float(g.double().norm()) ** 2 for g in expected.values())) ** 0.5


def without_state(found: tuple[Tensor, Gradients]) -> tuple[Tensor, Gradients]:
    """All but the initial state's gradient, which went on to the parameters where the state is the model's own."""
    return found[0], {name: g for name, g in found[1].items() if not name.startswith("state")}


def require_close(
    got: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], what: str = "chunked against plain"
) -> None:
    """Raise AssertionError unless losses and all gradients agree."""
    difference = abs(float(got[0]) - float(expected[0]))
    assert difference <= TOLERANCE * abs(float(expected[0])), f"{what}: the loss is off by {difference:.1e}"
    error, name = worst_error(got[1], expected[1])
    assert error <= TOLERANCE, f"{what}: {name} is off by {error:.1e}"


def check(
    build: Callable[[], tuple[nn.Module, Any, Any]], *, chunk: int, schedule: Any = None, way: str = "backward",
    from_state: bool = False,
) -> None:  # fmt: skip
    """Chunked equals Algorithm 1 equals plain: loss, parameters, inputs, initial state.

    Args:
        build: a factory of `cases`.
        from_state: start both from a state in the middle of life, given by the caller, instead of the model's own.
    """
    model, inputs, targets = build()
    state = None
    if from_state:
        with torch.no_grad():
            _, state = model(between(inputs, 0, 17), model.initial_state(batch_size(inputs)))
    states = [None if state is None else fresh_state(state) for _ in range(3)]
    expected = plain(model, inputs, targets, state=states[0])
    by_the_page = specified(model, inputs, targets, chunk=chunk, state=states[1])
    require_close(by_the_page, expected, "Algorithm 1 against plain")
    got = chunked(way, model, inputs, targets, chunk=chunk, schedule=schedule, state=states[2])
    for truth, what in ((by_the_page, "chunked against Algorithm 1"), (expected, "chunked against plain")):
        require_close(got, truth if state is not None or way == "backward" else without_state(truth), what)


def check_carried(
    build: Callable[[], tuple[nn.Module, Any, Any]], *, cuts: list[int], chunks: list[int], schedule: Any = None
) -> None:
    """Calls that hand the state on, and its gradient back, equal one plain call with a gradient on the final state.

    Args:
        cuts: where one call ends and the next begins.
        chunks: the chunk of each call: one more than `cuts`.
    """
    model, inputs, targets = build()
    targets = explicit(inputs, targets)
    count = int((targets != -100).sum())
    starts, stops = [0, *cuts], [*cuts, length(inputs)]
    states: list[Any] = [None]
    for start, stop, chunk in zip(starts, stops, chunks, strict=True):
        part = sg.evaluate(
            model, between(inputs, start, stop), between(targets, start, stop), chunk=chunk, state=states[-1]
        )
        states.append(part.final_state)
    final_gradient = gradient = cotangent_for(states[-1])
    expected = plain(model, inputs, targets, final_gradient=final_gradient)
    total, input_gradients = 0.0, []
    for start, stop, chunk, state in reversed(list(zip(starts, stops, chunks, states[:-1], strict=True))):
        result = sg.backward(
            model, fresh(between(inputs, start, stop)), between(targets, start, stop), chunk=chunk, schedule=schedule,
            normalizer=count, state=state, final_state_grad=gradient,
        )  # fmt: skip
        gradient, total = result.initial_state_grad, total + result.loss
        input_gradients.insert(0, pytree.tree_leaves(result.input_grads))
    found = collect(model, None, gradient)
    for i, pieces in enumerate(zip(*input_gradients, strict=True)):
        if pieces[0] is not None:
            found[f"input {i}"] = torch.cat(pieces, 1)
    require_close((total, found), expected)


class RecordedDropout(nn.Dropout):
    """Dropout that writes down every mask that a gradient went through, in that order, or plays given ones back."""

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.drawn: list[Tensor] = []
        self.replayed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.replayed is not None:
            return x * self.replayed
        mask = torch.empty_like(x).bernoulli_(1 - self.p) / (1 - self.p)
        y = x * mask
        if y.requires_grad:
            y.register_hook(lambda _: self.drawn.append(mask))
        return y


def check_draws(model: nn.Module, inputs: Any, *, chunk: int, schedule: Any = None, way: str = "backward") -> None:
    """With dropout in `model.dropout`, chunked equals one plain call with the masks that the reverse sweep drew."""
    recorded = model.dropout = RecordedDropout(0.3)
    model.train()
    got = chunked(way, model, inputs, None, chunk=chunk, schedule=schedule)
    recorded.replayed = torch.cat(recorded.drawn[::-1], 1)  # the last chunk is reversed first
    expected = plain(model, inputs, None)
    require_close(got, expected if way == "backward" else without_state(expected))
