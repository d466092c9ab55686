"""`verify` passes what is exact, says what is not and where, and leaves no trace."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call.arguments import Call
from slimgrad.states.sums import SumCarrier
from tests.contract.cases import signals
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

TOKENS = torch.arange(2 * 47).reshape(2, 47) * 7 % 13
FLOATS = torch.linspace(0, 1, 2 * 47 * 13).reshape(2, 47, 13)
WEIGHTS = torch.linspace(0.2, 1.3, 13)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", [AllKinds, CachedAttention, GatedRecurrence, LinearAttention])
def test_exact_models_pass(model_type: type[nn.Module], training: bool) -> None:
    report = sg.verify(model_type().train(training), TOKENS, chunk=10)
    assert report.passed, report
    assert str(report).startswith(f"exact: {model_type.__name__}, chunks of 10 in 47 tokens, float64")
    assert max(finding.error for finding in report.findings) < 1e-12
    assert {finding.check for finding in report.findings} == {"sweep", "step"}


def test_floating_inputs_and_lists_and_context_are_compared() -> None:
    model, inputs, targets = signals()
    report = sg.verify(model, inputs, targets, chunk=20)
    assert report.passed, report
    assert {"input 0", "input 1", "initial state [0]", "initial state [1]"} <= {f.name for f in report.findings}
    assert sg.verify(GatedRecurrence(), [TOKENS, TOKENS[:, :13]], chunk=5).passed


def test_dropout_is_compared_draw_by_draw() -> None:
    model = AllKinds(dropout=0.4).train()
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report


class EdgeModel(GatedRecurrence):
    """Its first token of every call sees no embedding of its own: right in one call, wrong at chunk edges."""

    def forward(self, inputs: Tensor, state: Any) -> Any:
        x = self.embed(inputs)
        shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)  # forgets the token before the chunk
        outputs, state = super().forward(inputs, state)
        return outputs + self.head(shifted), state


def test_a_step_that_depends_on_the_cut_fails_step_only() -> None:
    report = sg.verify(EdgeModel(), TOKENS, chunk=10)
    assert not report.passed
    assert report.global_errors["sweep"] < 1e-12
    assert report.global_errors["step"] > 1e-3
    assert report.worst.check == "step"
    assert "NOT EXACT" in str(report)
    report = sg.verify(EdgeModel(), TOKENS, chunk=100)  # one chunk has no edges, and proves nothing
    assert max(report.global_errors.values()) <= report.tolerance
    assert "NOTHING WAS CUT" in str(report)


def test_a_broken_sweep_fails_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SumCarrier, "roots", lambda self: [])
    report = sg.verify(LinearAttention(), TOKENS, chunk=10)
    assert not report.passed
    assert report.global_errors["sweep"] > 1e-3
    assert {f.name for f in report.findings if f.check == "sweep" and f.error > 1e-3} >= {"embed.weight", "qkv.weight"}


def test_float32_and_bfloat16_have_wider_tolerances() -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        report = sg.verify(LinearAttention(), TOKENS, chunk=10, dtype=dtype)
        assert report.tolerance == tolerance
        assert report.passed, report
        assert str(dtype).removeprefix("torch.") in report.setting


def test_a_nan_loss_does_not_pass() -> None:
    model = GatedRecurrence()
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    report = sg.verify(model, TOKENS, chunk=10)
    assert not report.passed
    assert "the loss is NaN, so there is nothing to compare" in report.notes


def test_a_nan_in_one_of_two_gradients_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = Call.deliver

    def spoilt(call: Call, initial_grads: Any) -> None:
        deliver(call, initial_grads)
        call.model.head.weight.grad[0, 0] = float("nan")

    monkeypatch.setattr(Call, "deliver", spoilt)
    report = sg.verify(GatedRecurrence(), TOKENS, chunk=10)
    assert not report.passed
    assert report.worst.name == "head.weight"
    assert report.worst.error != report.worst.error


def test_verify_leaves_no_trace() -> None:
    model = AllKinds(dropout=0.3).train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sg.verify(model, TOKENS, chunk=10)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert model.dropout.training
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Recurrence(nn.Module):
    """h = 0.99 h + tanh(w h + x): small, with a memory that is long; subclasses change one thing each."""

    def __init__(self, vocabulary: int = 13, width: int = 6) -> None:
        super().__init__()
        self.embed, self.w, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.Linear(width, 13)
        nn.init.normal_(self.embed.weight)

    def initial_state(self, batch_size: int) -> Any:
        return self.head.weight.new_zeros(batch_size, 6)

    def roll(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            h = 0.99 * h + torch.tanh(self.w(h) + x[:, t])
            outputs.append(h)
        return torch.stack(outputs, 1), h

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = self.roll(self.embed(inputs), state)
        return self.head(y), h


class HugeStateGradient(Recurrence):
    """A state of zeros under a normalisation: its own gradient is 1e12 times what the parameters' are."""

    cut = False

    def initial_state(self, batch_size: int) -> Any:
        return super().initial_state(batch_size), self.head.weight.new_zeros(batch_size, 6)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, last = state
        x = self.embed(inputs)
        y, h = self.roll(x + F.normalize(last, dim=-1)[:, None], h)
        return self.head(y), (h.detach() if self.cut else h, x[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cut_gradient_shows_beside_a_huge_gradient_of_the_initial_state(dtype: torch.dtype) -> None:
    model = HugeStateGradient()
    report = sg.verify(model, TOKENS, chunk=47, dtype=dtype)  # in more chunks its rounding is seen
    assert max(f.error for f in report.findings) <= report.tolerance, report
    model.cut = True
    report = sg.verify(model, TOKENS, chunk=10, dtype=dtype)
    errors = {f.name: f.error for f in report.findings if f.check == "step"}
    norms = {f.name: f.norm for f in report.findings if f.check == "step"}
    assert norms["initial state [1]"] > 1e9 * norms["w.weight"]  # it hid the error before
    assert not report.passed
    assert errors["w.weight"] > 0.1
    assert report.global_errors["sweep"] <= report.tolerance
    assert report.global_errors["step"] > 0.1


class Faint(Recurrence):
    """A memory with a millionth of a part in the outputs."""

    cut = False

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        x = self.embed(inputs)
        y, h = self.roll(x.detach(), state)
        return self.head(x) + 1e-6 * y.sum(-1, keepdim=True).sin() * self.head.weight[:, 0].detach(), (
            h.detach() if self.cut else h
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cut_gradient_shows_where_the_memory_is_faint(dtype: torch.dtype) -> None:
    model = Faint()
    assert sg.verify(model, TOKENS, chunk=10, dtype=dtype).passed
    model.cut = True
    report = sg.verify(model, TOKENS, chunk=10, dtype=dtype)
    norms = {f.name: f.norm for f in report.findings}
    assert norms["w.weight"] < 3e-5 * norms["head.weight"]
    assert not report.passed
    assert {f.name: f.error for f in report.findings if f.check == "step"}["w.weight"] > 10 * report.tolerance


class KeyBias(nn.Module):
    """Attention whose keys have a bias of their own, to which softmax is blind: its true gradient is zero."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, width), nn.Linear(width, 13)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def initial_state(self, batch_size: int) -> Any:
        return [sg.Growing(self.head.weight.new_zeros(batch_size, 0, 8)) for _ in range(2)]

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        x, start = self.embed(inputs), state[0].length
        keys, following_keys = state[0].append(self.k(x))
        values, following_values = state[1].append(self.v(x))
        hidden = torch.arange(keys.shape[1]) > torch.arange(start, keys.shape[1])[:, None]
        weights = (self.q(x) @ keys.transpose(1, 2)).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.head(x + weights @ values), [following_keys, following_values]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gradient_that_is_zero_but_for_rounding_does_not_cry_wolf(dtype: torch.dtype, alone: bool) -> None:
    model = KeyBias()
    if alone:  # then all parameters' gradients together are rounding
        model.requires_grad_(False)
        model.k.bias.requires_grad_(True)
    report = sg.verify(model, TOKENS, chunk=10, dtype=dtype)
    assert report.passed, report
    assert 0 < {f.name: f.norm for f in report.findings}["k.bias"] < 1e-3


class OnInputs(Recurrence):
    """The same on floating inputs, and optionally cut."""

    cut = False

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = self.roll(inputs, state)
        return self.head(y), h.detach() if self.cut else h


def test_a_frozen_model_is_judged_by_its_inputs() -> None:
    model, x = OnInputs().requires_grad_(False), torch.randn(2, 47, 6)
    for cut in (False, True):
        model.cut = cut
        report = sg.verify(model, x, TOKENS, chunk=10)
        assert {f.name for f in report.findings} == {"input 0", "initial state (the state itself)"}
        assert report.passed is not cut, report
    assert {f.name: f.error for f in report.findings if f.check == "step"}["input 0"] > 0.1


class ComplexRecurrence(Recurrence):
    """A complex parameter and a complex state that carries all the memory."""

    cut = False

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.polar(torch.full((6,), 0.97), torch.rand(6)))

    def initial_state(self, batch_size: int) -> Any:
        return self.rate.new_zeros(batch_size, 6)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        x, h, outputs = self.embed(inputs) if not inputs.is_complex() else inputs, state, []
        for t in range(x.shape[1]):
            h = self.rate * h + x[:, t]
            outputs.append(h)
        return self.head(torch.stack(outputs, 1).imag), h.detach() if self.cut else h.clone()


def test_complex_parameters_states_and_inputs_are_compared_whole() -> None:
    model = ComplexRecurrence()
    model.initial_state(1)  # complex64: the copy is complex128
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert {"rate", "initial state (the state itself)"} <= {f.name for f in report.findings}
    assert max(f.error for f in report.findings) < 1e-12  # measured: 7e-16
    signal = torch.randn(2, 47, 6, dtype=torch.complex64)
    report = sg.verify(model, signal, TOKENS, chunk=10)
    assert report.passed, report
    assert "input 0" in {f.name for f in report.findings}
    model.cut = True
    assert not sg.verify(model, TOKENS, chunk=10).passed


def test_an_error_of_the_imaginary_part_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = Call.deliver

    def spoilt(call: Call, initial_grads: Any) -> None:
        deliver(call, initial_grads)
        call.model.rate.grad.imag.mul_(1.01)

    monkeypatch.setattr(Call, "deliver", spoilt)
    report = sg.verify(ComplexRecurrence(), TOKENS, chunk=10)
    assert not report.passed
    assert report.worst.name == "rate"


class LogOfState(Recurrence):
    """A sum by logarithms, from a state of zeros: the gradient of that state is NaN, and nothing else is."""

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        terms = self.w(self.embed(inputs))
        sums = torch.cat([state.log()[:, None], terms], 1).logcumsumexp(1)[:, 1:]
        return self.head(sums), sums[:, -1].exp()


def test_what_is_nan_in_both_alike_is_no_difference() -> None:
    report = sg.verify(LogOfState(), TOKENS, chunk=10)
    assert report.passed, report
    assert (
        "nothing but NaN and infinities in both gradients of initial state (the state itself): not compared"
        in report.notes
    )


class BesideALeafOfZeroGradient(LogOfState):
    def initial_state(self, batch_size: int) -> Any:
        return [super().initial_state(batch_size), torch.zeros(batch_size, 2)]

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, following = super().forward(inputs, state[0])
        return outputs + 0.0 * state[1].sum(), [following, state[1]]


def test_what_is_nan_in_both_is_not_judged_by_the_zeros_beside_it() -> None:
    report = sg.verify(BesideALeafOfZeroGradient(), TOKENS, chunk=10)
    assert report.passed, report


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(13, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 13)

    def initial_state(self, batch_size: int) -> Any:
        return torch.zeros(1, batch_size, 6, dtype=torch.float32), torch.zeros(1, batch_size, 6)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embed(inputs), state)
        return self.head(y), state


class SharedLeaves(Recurrence):
    """Two leaves of the initial state are one tensor, or one is made of the other."""

    made = False

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(6))

    def initial_state(self, batch_size: int) -> Any:
        z = self.start.expand(batch_size, -1) if self.trained else self.start.new_ones(batch_size, 6)
        return (z, z.sin()) if self.made else (z, z)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, h = self.roll(self.embed(inputs), state[0])
        z, g = self.roll(self.embed(inputs), state[1])
        return self.head(y * z), (h, g)


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_leaves_of_the_initial_state_may_share_or_depend(made: bool, trained: bool) -> None:
    model = SharedLeaves()
    model.made, model.trained = made, trained
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert {"initial state [0]", "initial state [1]"} <= {f.name for f in report.findings}


class ListInPlace(Recurrence):
    """Writes its new state into the list that it was given."""

    def initial_state(self, batch_size: int) -> Any:
        return [super().initial_state(batch_size)]

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state[0] = self.roll(self.embed(inputs), state[0])
        return self.head(y), state


def test_a_list_updated_in_place_is_compared_by_its_first_leaves() -> None:
    report = sg.verify(ListInPlace(), TOKENS, chunk=10)
    assert report.passed, report
    assert "initial state [0]" in {f.name for f in report.findings}


def test_one_dimensional_inputs_and_lists_of_them() -> None:
    for inputs in (TOKENS[0], [TOKENS[0], TOKENS[1, :13]]):
        report = sg.verify(Recurrence(), inputs, chunk=10)
        assert report.passed, report
        assert "in 47 tokens" in report.setting


def test_a_refusal_passes_through() -> None:
    class NoInitialState(nn.Linear):
        pass

    with pytest.raises(sg.ModelError, match="has no initial_state"):
        sg.verify(NoInitialState(2, 2), TOKENS)
    with pytest.raises(sg.InputError, match="chunk=0") as refusal:
        sg.verify(Recurrence(), TOKENS, chunk=0)
    assert refusal.value.__context__ is None

    class BeginsWithNone(LSTM):
        def initial_state(self, batch_size: int) -> Any:
            return None

    with pytest.raises(Exception) as directly:  # noqa: PT011  whatever it is
        sg.backward(BeginsWithNone(), TOKENS, chunk=10)
    with pytest.raises(type(directly.value), match=re.escape(str(directly.value))):
        sg.verify(BeginsWithNone(), TOKENS, chunk=10)


def test_a_loss_that_is_a_mean_is_named() -> None:
    x, targets = torch.randn(2, 70, 6), torch.randn(2, 70, 13)
    report = sg.verify(OnInputs(), x, targets, chunk=10, loss_fn=nn.MSELoss())
    assert not report.passed
    assert "your loss_fn looks like a mean over the chunk" in report.notes[0]
    assert "added up over 7 chunks" in report.notes[0]

    def crooked(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum().sqrt()

    report = sg.verify(OnInputs(), x, targets, chunk=10, loss_fn=crooked)
    assert not report.passed
    assert "your loss_fn is not a sum over the chunk" in report.notes[0]


def test_a_sum_whose_step_fails_is_not_blamed_on_the_loss() -> None:
    report = sg.verify(EdgeModel(), TOKENS, chunk=10, loss_fn=weighted_sum)
    assert not report.passed
    assert report.notes == ()


def weighted_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def test_targets_are_counted_apart_from_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = TOKENS.clone()
    targets[0, 5:20] = -100
    assert sg.verify(Recurrence(), TOKENS, targets, chunk=10).passed
    monkeypatch.setattr("slimgrad.call.losses.IGNORED", 5)  # the sweep now counts wrongly, as it once did for bytes
    report = sg.verify(Recurrence(), TOKENS, targets, chunk=10, loss_fn=weighted_sum)
    assert not report.passed
    assert min(report.loss_errors.values()) > 1e-3


@pytest.mark.parametrize(("dtype", "ignored"), [(torch.uint8, 156), (torch.uint16, 65436)])
def test_unsigned_targets_pass_exactly_if_they_are_counted_right(dtype: torch.dtype, ignored: int) -> None:
    """-100 wraps round to these: ordinary targets."""
    model, vocabulary = Recurrence(), ignored + 1
    model.head = nn.Linear(6, vocabulary)
    targets = torch.full((2, 47), 7)
    targets[:, ::4] = ignored
    result = sg.backward(model, TOKENS, targets.to(dtype), chunk=10)
    assert sg.verify(model, TOKENS, targets.to(dtype), chunk=10).passed is (result.num_targets == targets.numel())


def test_sparse_gradients_are_compared() -> None:
    model = Recurrence()
    model.embed = nn.Embedding(13, 6, sparse=True)
    report = sg.verify(model, TOKENS, chunk=10)
    assert report.passed, report
    assert "embed.weight" in {f.name for f in report.findings}


def test_under_autocast_the_tolerance_is_that_of_its_dtype() -> None:
    model = Recurrence()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = sg.verify(model, TOKENS, chunk=10, dtype=torch.float32)
    assert report.passed, report
    assert report.tolerance == 5e-2
    assert "the model computes in bfloat16 inside (Linear" in report.notes[0]


@pytest.mark.filterwarnings("ignore")  # what torch._dynamo warns of is its own
def test_a_compiled_model_is_verified_as_it_runs() -> None:
    model = Recurrence()
    runs = []
    model.compile(backend=lambda graph, _: lambda *args: runs.append(0) or graph(*args))
    report = sg.verify(model, TOKENS, chunk=20)
    assert report.passed, report
    assert "Recurrence._compiled_call_impl was set on the instance" in report.notes[0]
    assert runs


def test_a_reader_is_refused_by_name() -> None:
    class Counting:
        length, batch = 60, 1

        def read(self, start: int, stop: int) -> Tensor:
            return torch.arange(start, stop)[None] % 13

    with pytest.raises(sg.InputError, match="expected tensors, got a reader"):
        sg.verify(GatedRecurrence(), Counting(), chunk=8)
