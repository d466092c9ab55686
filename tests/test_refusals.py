"""What cannot be exact raises, before any work is lost, and says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13


def require_untouched(model: nn.Module) -> None:
    assert all(p.grad is None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def require_refused(
    model: nn.Module,
    error: type[Exception] | tuple[type[Exception], ...],
    message: str,
    *,
    tokens: Any = TOKENS,
    **options: Any,
) -> None:
    """Both sweeps refuse, and `.grad` is as it was."""
    options = {"chunk": 7} | options
    with pytest.raises(error, match=message):
        sg.backward(model, tokens, **options)
    with pytest.raises(error, match=message):
        sg.loss(model, tokens, **options).backward()
    require_untouched(model)


# --- what the caller passes ---


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True, "4096"])
def test_a_chunk_is_a_positive_number_of_tokens(chunk: Any) -> None:
    require_refused(GatedRecurrence(), sg.InputError, r"chunk=.*: expected a whole number of tokens", chunk=chunk)


@pytest.mark.parametrize(
    ("tokens", "targets", "message"),
    [
        (TOKENS[:, :0], None, "at least one sequence and one token, got batch 2 and time 0"),
        (TOKENS[:0], None, "got batch 0 and time 40"),
        (
            torch.tensor(3),
            None,
            r"expected tensors \[batch, time, ...\] with the same batch and time, got a tensor \[\]\. ",
        ),
        (
            {"a": TOKENS, "b": TOKENS[:, 1:]},
            TOKENS,
            r"same batch and time, got a tensor \[2, 40\], a tensor \[2, 39\]\.",
        ),
        ({"a": TOKENS, "b": 3}, TOKENS, r"got a tensor \[2, 40\], a int\. For NumPy arrays use torch.from_numpy"),
        (torch.rand(2, 40), None, "targets=None means next-token prediction, which needs integer inputs"),
        ({"a": TOKENS}, None, "targets=None means next-token prediction"),
        (TOKENS, TOKENS[:, 1:], r"targets must have the inputs' batch and time \(2, 40\), got \(2, 39\)"),
    ],
)
def test_inputs_and_targets_that_do_not_fit(tokens: Any, targets: Any, message: str) -> None:
    require_refused(GatedRecurrence(), sg.InputError, message, tokens=tokens, targets=targets)


@pytest.mark.parametrize(
    ("targets", "came"),
    [
        (TOKENS[:, :1], r"\(2, 1\)"),  # one label per sequence
        (TOKENS[:, 0], r"\(1, 2\)"),  # the same without an axis of time
        (TOKENS.t(), r"\(40, 2\)"),
        ({"labels": TOKENS[:1]}, r"\(1, 40\)"),
    ],
)
def test_targets_of_another_shape_say_what_to_pass(targets: Any, came: str) -> None:
    message = (
        rf"targets must have the inputs' batch and time \(2, 40\), got {came}: one target for each step\. For one "
        r"label per sequence write it at the step that should predict it and -100 at all others; for regression pass"
    )
    require_refused(GatedRecurrence(), sg.InputError, message, targets=targets)


@pytest.mark.parametrize("number", [0, 2])
def test_an_empty_document_is_named_by_its_number(number: int) -> None:
    documents = [TOKENS[0], TOKENS[1]]
    documents.insert(number, TOKENS[0, :0])
    message = (
        rf"sequence {number} of the list: expected at least one sequence and one token, got batch 1 and time 0\. Leave "
        r"empty documents out, with their targets and states"
    )
    require_refused(GatedRecurrence(), sg.InputError, message, tokens=documents)
    message = rf"sequence {number} of the list: targets must have the inputs' batch and time"
    targets = [TOKENS[:1], TOKENS[:1], TOKENS[:1]]
    targets[number] = TOKENS[:1, 1:]
    require_refused(GatedRecurrence(), sg.InputError, message, tokens=[TOKENS[:1]] * 3, targets=targets)


def test_gradients_in_inference_mode() -> None:
    model = GatedRecurrence()
    message = r"inside torch\.inference_mode, where tensors keep no graph.*use slimgrad\.evaluate"
    for call in (sg.backward, sg.loss, sg.token_loss, lambda model, *args, **options: sg.Chunked(model)(*args)):
        with torch.inference_mode(), pytest.raises(sg.InputError, match=message):
            call(model, TOKENS, chunk=7)
    require_untouched(model)


def test_targets_that_do_not_fit_the_default_loss() -> None:
    targets = torch.rand(2, 40, 13)
    require_refused(
        GatedRecurrence(), sg.InputError,
        r"expects logits \[batch, time, classes\] and integer targets \[batch, time\]; got \[2, \d, 13\] and "
        r"\[2, \d, 13\]. Pass loss_fn=", targets=targets,
    )  # fmt: skip


def test_a_loss_of_another_shape() -> None:
    mean = r"loss_fn must return the sum over the chunk, shape \[\]; got \[2, \d\]"
    require_refused(GatedRecurrence(), sg.InputError, mean, loss_fn=lambda outputs, targets: outputs[..., 0])
    require_refused(
        GatedRecurrence(), sg.InputError, r"the sum over the chunk, shape \[\]; got float",
        loss_fn=lambda outputs, targets: 1.0,
    )  # fmt: skip
    with pytest.raises(sg.InputError, match=r"one loss per token, shape \[2, 7\]; got \[\]"):
        sg.token_loss(GatedRecurrence(), TOKENS, chunk=7, loss_fn=lambda outputs, targets: outputs.sum())


def test_a_loss_with_parameters_of_its_own() -> None:
    projection = nn.Linear(13, 1)
    require_refused(
        GatedRecurrence(), sg.ModelError,
        r"the loss depends on a tensor of shape \(1, 13\) that requires gradients and is neither a parameter of the "
        r"model, nor an input, nor part of the state: its gradient would be lost. Make it a parameter of the model",
        loss_fn=lambda outputs, targets: projection(outputs).sum(),
    )  # fmt: skip
    assert projection.weight.grad is None
    sg.evaluate(GatedRecurrence(), TOKENS, chunk=7, loss_fn=lambda outputs, targets: projection(outputs).sum())


def test_nothing_to_differentiate() -> None:
    model = GatedRecurrence().requires_grad_(False)
    with pytest.raises(sg.InputError, match=r"nothing requires a gradient.*use slimgrad.evaluate"):
        sg.backward(model, TOKENS, chunk=7)


# --- what the model is ---


def test_a_model_follows_the_protocol() -> None:
    with pytest.raises(sg.ModelError, match=r"expected a torch.nn.Module, got function"):
        sg.backward(lambda x: x, TOKENS)
    with pytest.raises(sg.ModelError, match=r"Linear has no initial_state\(batch_size\).*See slimgrad.CausalModel"):
        sg.Chunked(nn.Linear(2, 2))
    assert isinstance(GatedRecurrence(), sg.CausalModel)
    assert not isinstance(nn.Linear(2, 2), sg.CausalModel)


class Bent(nn.Module):
    """A gated recurrence whose `forward` another function bends."""

    def __init__(self, bend: Callable[[GatedRecurrence, Tensor, Any], Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = GatedRecurrence() if inner is None else inner
        self.bend = bend

    def initial_state(self, batch_size: int) -> Any:
        return self.inner.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> Any:
        return self.bend(self.inner, inputs, state)


def test_forward_returns_a_pair() -> None:
    message = r"forward must return \(outputs, next_state\), got Tensor"
    require_refused(Bent(lambda inner, x, s: inner(x, s)[0]), sg.ModelError, message)
    require_refused(Bent(lambda inner, x, s: (*inner(x, s), 3)), sg.ModelError, r"\(outputs, next_state\), got tuple")


def test_a_state_of_another_structure() -> None:
    def drop(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, {"h": state["h"]}

    message = r"than it was given: expected the keys \['h', 'position'\], got \['h'\]\..*in the same containers"
    require_refused(Bent(drop), sg.ModelError, message)


def test_a_state_leaf_of_another_kind() -> None:
    def scalar(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, state | {"h": 3.0}

    require_refused(Bent(scalar), sg.ModelError, r"state \['h'\]: expected a tensor, as the model was given")

    def unwrapped(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, state | {"sums": state["sums"].value}

    require_refused(
        Bent(unwrapped, LinearAttention()), sg.ModelError,
        r"state \['sums'\]: expected the object that advance/append returned, or the one the model was given",
    )  # fmt: skip

    def renewed(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, state | {"keys": sg.Growing(state["keys"].value)}

    require_refused(Bent(renewed, CachedAttention()), sg.ModelError, r"state \['keys'\]: expected the object that")


def test_a_sum_is_advanced_once() -> None:
    def twice(inner: nn.Module, x: Tensor, s: Any) -> Any:
        s["sums"].advance(torch.zeros(2, 4, 5))
        return inner(x, s)

    message = r"advance was called twice on one PrefixSum within a chunk \(second delta: \(2, 4, 5\)\)"
    require_refused(Bent(twice, LinearAttention()), sg.ModelError, message)

    def onward(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        return outputs, state | {"sums": state["sums"].advance(torch.zeros(2, 4, 5))[1]}

    require_refused(Bent(onward, LinearAttention()), sg.ModelError, "advance was called twice on one PrefixSum")

    def rows(inner: nn.Module, x: Tensor, s: Any) -> Any:
        s["keys"].append(torch.zeros(2, 1, 6))
        return inner(x, s)

    message = r"append was called twice on one Growing within a chunk \(second rows: \(2, 7, 6\)\)"
    require_refused(Bent(rows, CachedAttention()), sg.ModelError, message)


def test_a_sum_is_not_read_before_it_is_advanced() -> None:
    def peek(name: str) -> Callable:
        return lambda inner, x, s: (s[name].value, inner(x, s))[1]

    require_refused(
        Bent(peek("sums"), LinearAttention()), sg.ModelError, "the value of a PrefixSum was read before advance"
    )
    require_refused(
        Bent(peek("keys"), CachedAttention()), sg.ModelError, "the value of a Growing was read before append"
    )


def test_rows_that_do_not_match() -> None:
    def wrong(inner: nn.Module, x: Tensor, s: Any) -> Any:
        s["keys"].append(torch.zeros(2, 3, 7))

    message = r"expects rows \[batch, new, ...\] that match \[2, 0, 6\] except along axis 1, got \[2, 3, 7\]"
    require_refused(Bent(wrong, CachedAttention()), sg.ModelError, message)
    with pytest.raises(sg.ModelError, match=r"Growing expects \[batch, time, ...\], got shape \(3,\)"):
        sg.Growing(torch.zeros(3))


def test_a_state_of_a_sweep_that_is_over() -> None:
    stolen = []

    def steal(inner: nn.Module, x: Tensor, s: Any) -> Any:
        stolen.append(s)
        return inner(x, s)

    sg.backward(Bent(steal, LinearAttention()), TOKENS, chunk=7)
    with pytest.raises(sg.ModelError, match="advance was called on a state of a sweep that is over"):
        stolen[0]["sums"].advance(torch.zeros(2, 4, 5))
    stolen.clear()
    sg.backward(Bent(steal, CachedAttention()), TOKENS, chunk=7)
    with pytest.raises(sg.ModelError, match="append was called on a state of a sweep that is over"):
        stolen[0]["keys"].append(torch.zeros(2, 1, 6))


@pytest.mark.parametrize("chunk", [7, 100])
def test_a_state_updated_in_place(chunk: int) -> None:
    def in_place(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        s["h"].copy_(state["h"].detach())
        return outputs, s | {"position": state["position"]}

    given = {"h": torch.rand(2, 6), "position": torch.zeros((), dtype=torch.int64)}
    before = given["h"].clone()
    model, first = Bent(in_place), f"tokens 0 to {min(chunk, 40) - 1}"
    for way in (sg.backward, sg.loss):
        # where the state takes a gradient, torch itself refuses
        with pytest.raises((sg.ModelError, RuntimeError), match=rf"modified in place in {first}|in-place operation"):
            way(model, TOKENS, chunk=chunk, state=given)
    assert torch.equal(given["h"], before)  # the caller's own tensor was never written to
    require_untouched(model)


class Batched(GatedRecurrence):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, inputs: Tensor, state: Any) -> Any:
        self.norm(self.embed(inputs).flatten(0, 1))
        return super().forward(inputs, state)


def test_batch_norm_in_training_mode_is_refused_and_unchanged() -> None:
    model = Batched().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    identities = {name: id(b) for name, b in model.named_buffers()}
    require_refused(
        model, sg.ModelError,
        r"the model wrote to its buffers while it ran: BatchNorm1d.running_mean, BatchNorm1d.running_var, "
        r"BatchNorm1d.num_batches_tracked. .* Put such layers in eval mode",
    )  # fmt: skip
    with pytest.raises(sg.ModelError, match="wrote to its buffers"):
        sg.evaluate(model, TOKENS, chunk=7)
    assert {name: id(b) for name, b in model.named_buffers()} == identities
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    sg.backward(model.eval(), TOKENS, chunk=7)  # in eval mode buffers are constants, and fine
    assert {name: id(b) for name, b in model.named_buffers()} == identities


class Counting(GatedRecurrence):
    """Puts a new tensor where its buffer was, or writes to it in the first call, or the third."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor, state: Any) -> Any:
        self.calls += 1
        if self.how == "replaced":
            self.seen = self.seen + 1
        elif self.calls == 3:
            self.seen.add_(1)
        return super().forward(inputs, state)


@pytest.mark.parametrize("how", ["replaced", "late"])
def test_a_buffer_replaced_or_written_late_is_refused(how: str) -> None:
    model = Counting(how)
    with pytest.raises(sg.ModelError, match=r"wrote to its buffers while it ran: Counting.seen"):
        sg.backward(model, TOKENS, chunk=7)
    require_untouched(model)
    if how == "replaced":
        assert float(model.seen) == 0.0


def test_layers_without_shapes() -> None:
    class Lazy(GatedRecurrence):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LazyLinear(13)

    model = Lazy()
    message = "LazyLinear has parameters without a shape yet; expected a model whose lazy layers have been made. Run it"
    for call in (sg.backward, sg.loss, sg.evaluate, lambda model, *args, **options: sg.Chunked(model)):
        with pytest.raises(sg.ModelError, match=message):
            call(model, TOKENS, chunk=7)
    model(TOKENS[:, :1], model.initial_state(2))
    sg.backward(model, TOKENS, chunk=7)
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("kind", ["tokens", "signals"])
def test_inputs_modified_in_place(kind: str) -> None:
    def shift(inner: nn.Module, x: Tensor, s: Any) -> Any:
        if x.is_floating_point():
            return inner(x.mul_(2)[..., 0].abs().long() % 13, s)
        return inner(x.add_(1).remainder_(13), s)

    given = TOKENS.clone() if kind == "tokens" else torch.arange(2 * 40 * 3.0).reshape(2, 40, 3)
    targets = TOKENS if kind == "signals" else None
    message = r"the model modified its inputs in place; expected them left alone.*inputs = inputs\.clone\(\)"
    require_refused(Bent(shift), sg.ModelError, message, tokens=given, targets=targets)
    with pytest.raises(sg.ModelError, match=message):
        sg.evaluate(Bent(shift), given, targets, chunk=7)


@pytest.mark.parametrize("late", [False, True])
def test_a_state_written_through_data(late: bool) -> None:
    """Unseen by torch, which counts no version there; later than in the first chunk the rebuilt bits tell."""

    def unseen(inner: nn.Module, x: Tensor, s: Any) -> Any:
        outputs, state = inner(x, s)
        if not late or int(s["position"]) == 14:
            s["h"].data.copy_(state["h"].detach())
            return outputs, s | {"position": state["position"]}
        return outputs, state

    message = (
        r"state \['h'\], tokens \d+ to \d+: rebuilt with other bits"
        if late
        else r"forward wrote to its state in place, unseen by torch \(through \.data or NumPy\).*Clone the state first"
    )
    require_refused(Bent(unseen), (sg.ModelError, sg.StateMismatchError), message)


class Remembering(GatedRecurrence):
    """A buffer that is registered as None and filled when the model runs; read back, or not."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.register_buffer("last", None)
        self.reads = reads

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, state = super().forward(inputs, state)
        if self.reads and self.last is not None:
            outputs = outputs + self.last
        self.last = outputs[:, -1:].detach()
        return outputs, state


def test_a_buffer_that_begins_as_none_and_is_state() -> None:
    message = (
        r"Remembering changed attributes while a chunk ran \([\w, ]*last.*Carry what must be remembered in the state"
    )
    for call in (sg.backward, sg.loss, sg.evaluate):
        model = Remembering(reads=True)
        with pytest.raises(sg.ModelError, match=message):
            call(model, TOKENS, chunk=7)
        require_untouched(model)
    written, free = Remembering(reads=False).double(), GatedRecurrence().double()
    free.load_state_dict(written.state_dict(), strict=False)
    for model in (written, free):
        sg.backward(model, TOKENS, chunk=7)
    for (name, p), q in zip(written.named_parameters(), free.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_sweep_inside_a_sweep() -> None:
    def nested(inner: nn.Module, x: Tensor, s: Any) -> Any:
        sg.evaluate(LinearAttention(), TOKENS, chunk=7)
        return inner(x, s)

    message = "a sweep was started inside a chunk of another; expected one at a time"
    require_refused(Bent(nested), sg.SweepError, message)
    inner = GatedRecurrence()
    require_refused(
        GatedRecurrence(), sg.SweepError, message, loss_fn=lambda outputs, targets: sg.loss(inner, TOKENS, chunk=7)
    )
    sg.backward(inner, TOKENS, chunk=7)  # and the refusal leaves the door open


def test_a_sweep_may_follow_another_before_its_backward() -> None:
    first, second = GatedRecurrence(), LinearAttention()
    losses = sg.loss(first, TOKENS, chunk=7), sg.loss(second, TOKENS, chunk=9)
    sg.backward(second, TOKENS, chunk=5)
    sum(losses).backward()
    assert first.start.grad is not None


def test_every_error_has_the_root() -> None:
    for error in (sg.InputError, sg.ModelError, sg.SweepError, sg.StateMismatchError, sg.NonFiniteError):
        assert issubclass(error, sg.SlimgradError)
    assert issubclass(sg.InputError, ValueError)
    assert issubclass(sg.ModelError, TypeError)
    assert issubclass(sg.ConsumedError, sg.SweepError)
    assert issubclass(sg.SweepError, RuntimeError)


def test_all_kinds_of_states_say_what_they_are() -> None:
    state = AllKinds().initial_state(2)
    assert repr(state["sums"][0]) == "PrefixSum(shape=(2, 6), dtype=torch.float32)"
    assert repr(state["cache"][0]) == "Growing(length=0, row_shape=(12,), dtype=torch.float32)"
    assert (state["sums"][0].device.type, state["cache"][0].device.type) == ("cpu", "cpu")
    assert (state["sums"][0].shape, state["cache"][0].dtype) == ((2, 6), torch.float32)
