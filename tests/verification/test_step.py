"""`verify_step` tells of somebody else's function whether it may be cut, and whether its state passes gradients on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg

X = torch.linspace(-1, 1, 2 * 31 * 4).reshape(2, 31, 4).sin()


class Plain:
    """A convolution over three inputs and a gated recurrence, written as a library would: flags spoil it."""

    def __init__(self, **flags: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.taps, self.w = torch.randn(3, 4, generator=generator), 0.3 * torch.randn(4, 4, generator=generator)
        self.flags = flags

    def __call__(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        conv, h = (x.new_zeros(len(x), 2, 4), x.new_zeros(len(x), 4)) if state is None else (state["conv"], state["h"])
        if self.flags.get("drops"):
            conv, h = torch.zeros_like(conv), torch.zeros_like(h)
        if self.flags.get("drops conv"):
            conv = torch.zeros_like(conv)
        if self.flags.get("detaches given"):
            h = h.detach()
        if self.flags.get("doubles"):
            h = h * 1.0 if state is None else h + (h - h.detach())
        padded = torch.cat([conv, x], 1)
        y = sum(padded[:, k : k + x.shape[1]] * self.taps[k].to(x.dtype) for k in range(3))
        if self.flags.get("statistic"):
            y = y - y.mean(1, keepdim=True)
        if self.flags.get("narrow"):
            y = y.float().cumsum(1).to(x.dtype) / 30
        if self.flags.get("dropout"):
            y = F.dropout(y, 0.5)
        if self.flags.get("noise"):
            y = y * (1 + 0.01 * random.random())
        outputs = []
        for t in range(x.shape[1]):
            h = 0.95 * h + torch.tanh(y[:, t] @ self.w.to(x.dtype))
            outputs.append(h)
        if self.flags.get("detaches returned"):
            h = h.detach()
        tail = padded[:, -2:]
        if self.flags.get("writes"):
            conv.copy_(tail)
            tail = conv
        if self.flags.get("returns none"):
            return torch.stack(outputs, 1), None
        return torch.stack(outputs, 1), {"conv": tail, "h": h}


def start() -> dict[str, Tensor]:
    return {"conv": torch.zeros(2, 2, 4), "h": torch.full((2, 4), 0.5)}


@pytest.mark.parametrize("chunk", [None, 1, 6, 7, 29])
def test_a_step_that_may_be_cut_passes(chunk: int | None) -> None:
    report = sg.verify_step(Plain(), X, start(), chunk=chunk)
    assert report.passed, report
    assert (report.faults, report.notes) == ((), ())
    assert str(report).startswith(f"passed: Plain, {chunk or 11} of 31 inputs a call, float64; tolerance 1e-09")
    assert {f.name for f in report.findings if f.check == "cut"} == {
        "outputs",
        "final state ['conv']",
        "final state ['h']",
    }
    names = {f.name for f in report.findings if f.check == "gradient"}
    assert names == {f"input, the first {chunk or 11}", "initial state ['conv']", "initial state ['h']"}
    assert max(f.error for f in report.findings) < 1e-13  # measured: 6e-16


FAULTS = {
    "drops": "the state is dropped: the second call does not depend on it",
    "returns none": "the state is dropped: the step returns none",
    "drops conv": "leaf ['conv']: the second call does not depend on it",
    "detaches given": "leaf ['h']: no gradient comes back through it: the next call detaches what it is given",
    "detaches returned": "leaf ['h']: no gradient comes back through it: it is detached where it is returned",
    "doubles": "the gradient that comes back through the state is another one than within one call",
    "statistic": "outputs or state depend on where the inputs are cut",
    "writes": "it writes to the state it is given, leaf ['conv']: clone it in your adapter",
    "noise": "two equal calls gave different results",
    "dropout": "it draws random numbers",
}


@pytest.mark.parametrize("flag", FAULTS)
def test_what_is_wrong_is_named(flag: str) -> None:
    report = sg.verify_step(Plain(**{flag: True}), X, start())
    assert not report.passed
    assert any(fault.startswith(FAULTS[flag]) for fault in report.faults), report
    assert f"fault: {FAULTS[flag]}" in str(report)
    assert len(report.faults) == 1, report


def test_a_lost_gradient_is_far_from_the_tolerance() -> None:
    for flag in ("detaches given", "detaches returned"):
        report = sg.verify_step(Plain(**{flag: True}), X, start())
        errors = {f.name: f.error for f in report.findings}
        assert max(error for name, error in errors.items() if name.startswith(("outputs", "final"))) < 1e-13
        assert errors["input, the first 11"] > 0.1


def test_none_at_first_comes_with_what_to_return_instead() -> None:
    report = sg.verify_step(Plain(), X)
    assert report.passed, report
    assert "zeros in the shapes of the next state give the same outputs" in report.notes[0]


def test_a_cast_inside_is_said_and_judged_by_its_own_tolerance() -> None:
    def sums(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = s[:, None] + x.float().cumsum(1).to(x.dtype)
        return y.sin(), y[:, -1]

    report = sg.verify_step(sums, X, torch.zeros(2, 4))
    assert report.passed, report
    assert report.tolerance == 1e-4
    assert "it computes in float32 inside" in report.notes[0]
    lost = sg.verify_step(lambda x, s: (sums(x, s)[0], sums(x, s)[1].detach()), X, torch.zeros(2, 4))
    assert not lost.passed


def test_what_does_not_run_in_float64_is_compared_in_its_own_dtype() -> None:
    weight = {"w": torch.full((4, 4), 0.1)}

    class Hidden:
        def __call__(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y = h[:, None] + (x @ weight["w"]).cumsum(1)
            return y, y[:, -1]

    report = sg.verify_step(Hidden(), X, torch.zeros(2, 4))
    assert report.passed, report
    assert report.tolerance == 1e-4
    assert report.notes[0].startswith("it does not run in float64 (RuntimeError")
    assert report.notes[0].endswith("compared in float32")


def test_modules_are_copied_and_left_as_they_are() -> None:
    gru = nn.GRU(4, 4, batch_first=True)
    before = [p.clone() for p in gru.parameters()]
    for step in (gru, lambda x, h: gru(x, h), gru.forward):
        report = sg.verify_step(step, X, torch.zeros(1, 2, 4))
        assert report.passed, report
        assert report.tolerance == 1e-9
        assert report.notes == ()
        assert {"weight_hh_l0", "initial state"} <= {f.name for f in report.findings}
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(gru.parameters(), before, strict=True))
    assert next(gru.parameters()).dtype == torch.float32


class Tokens(nn.Module):
    """Integer inputs: gradients come back to parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.detaches = nn.Embedding(7, 4), nn.GRU(4, 4, batch_first=True), False

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cell(self.embed(inputs), state)
        return y, h.detach() if self.detaches else h


@pytest.mark.parametrize("frozen", [False, True])
def test_tokens(frozen: bool) -> None:
    tokens, model = torch.arange(62).reshape(2, 31) % 7, Tokens().requires_grad_(not frozen)
    assert sg.verify_step(model, tokens, torch.zeros(1, 2, 4)).passed
    model.detaches = True
    report = sg.verify_step(model, tokens, torch.zeros(1, 2, 4))
    assert not report.passed
    if not frozen:  # else nothing has a graph to lose but the initial state's
        assert "leaf (the state itself): no gradient comes back through it" in str(report)


def test_complex_states_and_trees_of_inputs() -> None:
    def step(inputs: dict[str, Tensor], h: Tensor) -> tuple[Any, Tensor]:
        outputs = []
        for t in range(inputs["a"].shape[1]):
            h = 0.97j * h + inputs["a"][:, t] * inputs["b"][:, t]
            outputs.append(h)
        y = torch.stack(outputs, 1)
        return (y.imag, y.real), h.clone()

    report = sg.verify_step(step, {"a": X, "b": X.cos()}, torch.zeros(2, 4, dtype=torch.complex64))
    assert report.passed, report
    lost = sg.verify_step(
        lambda x, h: (step(x, h)[0], step(x, h)[1].detach()), {"a": X, "b": X}, torch.zeros(2, 4) * 0j
    )
    assert not lost.passed
    assert "detached where it is returned" in str(lost)


def test_a_leaf_whose_gradient_is_rightly_none_is_no_fault() -> None:
    """A running maximum that cancels, as in stabilised exponential gating: detached, and nothing is missing."""

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        total, top = state
        following = torch.maximum(top, x.detach().amax(1))
        sums = total * (top - following).exp() + (x - following[:, None]).exp().cumsum(1)[:, -1]
        within = total[:, None] * (top - following).exp()[:, None] + (x - following[:, None]).exp().cumsum(1)
        return within.log() + following[:, None], (sums, following)

    report = sg.verify_step(step, X, (torch.zeros(2, 4), torch.zeros(2, 4)))
    cut = {f.name: f.error for f in report.findings}
    assert report.faults == (), report
    assert cut["input, the first 11"] < 1e-12


def test_what_has_no_memory_passes_with_a_note() -> None:
    report = sg.verify_step(lambda x, h: (x.sin(), h), X, torch.zeros(2, 4))
    assert report.passed, report
    assert any("hardly depend on the first inputs" in note for note in report.notes)


def test_what_has_no_graph_at_all_is_named() -> None:
    step = torch.no_grad()(Plain().__call__)
    report = sg.verify_step(step, X, start())
    assert not report.passed
    assert report.faults == ("nothing that it returns has a graph: it runs under no_grad, or detaches everything",)


def test_a_write_that_autograd_refuses_is_a_fault_and_no_error() -> None:
    def step(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y = x.cumsum(1) * h[:, None].exp()
        return y * h[:, None], h.add_(y[:, -1])

    report = sg.verify_step(step, X, torch.zeros(2, 4))
    assert not report.passed
    assert report.faults[0].startswith("no gradient can be taken of it (RuntimeError: one of the variables needed")
    assert "it writes to the state it is given, leaf (the state itself): clone it in your adapter" in report.faults


def test_a_leaf_that_changes_its_dtype_is_said() -> None:
    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, rest = state
        y = (0.0 if h is None else h)[..., None, :] + x.cumsum(1) if h is not None else x.cumsum(1)
        return y + rest.to(x.dtype)[:, None], (y[:, -1], rest.float())

    report = sg.verify_step(step, X, (None, torch.zeros(2, 4, dtype=torch.bfloat16)))
    assert report.passed, report
    assert report.notes[-1].startswith(
        "leaf [0] begins as None, and a model's initial_state must return tensors: zeros"
    )
    assert report.notes[-1].endswith("give the same outputs")
    assert "leaf [1] was given as bfloat16 and comes back as float32" in report.notes


def test_what_cannot_be_compared_is_refused() -> None:
    class Cache:
        pass

    with pytest.raises(sg.InputError, match=r"leaf .*got a Cache"):
        sg.verify_step(lambda x, h: (x, Cache()), X, torch.zeros(2, 4))
    with pytest.raises(sg.InputError, match="got a Cache"):
        sg.verify_step(Plain(), X, Cache())
    with pytest.raises(sg.InputError, match=r"to return .outputs, next_state., got Tensor"):
        sg.verify_step(lambda x, h: x, X, torch.zeros(2, 4))
    with pytest.raises(sg.InputError, match=r"outputs: expected \[batch, time"):
        sg.verify_step(lambda x, h: (x.sum(1), h), X, torch.zeros(2, 4))
    for chunk in (30, 31):  # a remainder of one is no chunk of its own
        with pytest.raises(sg.InputError, match="at least two chunks"):
            sg.verify_step(Plain(), X, chunk=chunk)
    with pytest.raises(sg.InputError, match="same batch and time"):
        sg.verify_step(Plain(), X[0, 0])


@pytest.mark.parametrize("flag", ["none", "writes", "drops", "detaches given", "dropout"])
def test_generators_and_the_given_state_are_left_as_they_were(flag: str) -> None:
    state, rng, python_rng = start(), torch.get_rng_state(), random.getstate()
    sg.verify_step(Plain(**{flag: True}), X, state)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert torch.equal(state["conv"], torch.zeros(2, 2, 4))
    assert torch.get_default_dtype() == torch.float32
