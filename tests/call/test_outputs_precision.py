"""`sg.outputs` under autocast, in 16 bits, with a scaler: gradients that overflow are delivered for it to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.call.test_outputs import SCHEDULES, TOKENS, gradients, projected
from tests.contract.cases import CASES, Built
from tests.contract.contract import global_error, is_floating
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

every_model = pytest.mark.parametrize("build", [build for _, build in CASES], ids=[name for name, _ in CASES])
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
KINDS = [GatedRecurrence, CachedAttention, LinearAttention, AllKinds]


def in_one_graph(model: nn.Module, chunk: int) -> Tensor:
    """Plain PyTorch, cut as slimgrad cuts: 16 bits come out otherwise for other shapes."""
    state, pieces = model.initial_state(len(TOKENS)), []
    for start in range(0, TOKENS.shape[1], chunk):
        outputs, state = model(TOKENS[:, start : start + chunk], state)
        pieces.append(outputs)
    return torch.cat(pieces, 1)


class Watched(GatedRecurrence):
    """Writes down whether it ran under autocast, and in which type."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return super().forward(inputs, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("later", [False, True])
def test_the_autocast_of_the_call_is_that_of_both_sweeps(dtype: torch.dtype, later: bool) -> None:
    """Whatever autocast is on when backward is called."""
    model = Watched()
    with torch.autocast("cpu", dtype, cache_enabled=False):
        whole = in_one_graph(model, 7)
        model.seen.clear()
        outputs = sg.outputs(model, TOKENS, chunk=7)
    assert outputs.dtype == dtype
    assert torch.equal(outputs, whole)
    with torch.autocast("cpu", torch.bfloat16, enabled=later):
        got = gradients(model, projected(outputs.float()))
    assert set(model.seen) == {(True, dtype)}
    assert len(model.seen) > 6 * 2
    error = global_error(got, gradients(model, projected(whole.float())))
    print("autocast", dtype, error)
    assert error <= 1e-6  # measured: 0


def test_without_autocast_in_the_call_there_is_none_later() -> None:
    model = Watched()
    outputs = sg.outputs(model, TOKENS, chunk=7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = projected(outputs)
        loss.backward()
    assert {enabled for enabled, _ in model.seen} == {False}


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_16_bits(model_type: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """The outputs, their gradient, and the parameters' gradients, which gather in float32 and are rounded once."""
    torch.manual_seed(0)
    model, truth = model_type(), model_type().double()
    truth.load_state_dict(model.to(dtype).state_dict())
    outputs = sg.outputs(model, TOKENS, chunk=7)
    outputs.retain_grad()
    assert outputs.dtype == dtype
    got = gradients(model, projected(outputs.float()))
    assert outputs.grad.dtype == dtype
    assert {g.dtype for g in got.values()} == {dtype}
    expected = gradients(truth, projected(truth(TOKENS, truth.initial_state(2))[0]))
    plain = gradients(model, projected(model(TOKENS, model.initial_state(2))[0].float()))
    errors = [global_error(found, expected) for found in (got, plain)]
    print(model_type.__name__, dtype, errors)
    assert errors[0] <= 2 * errors[1]


# --- gradients that overflow ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("model_type", KINDS)
def test_a_scaler_finds_an_overflow_and_skips_its_step(model_type: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = model_type()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-124)
    before = [p.detach().clone() for p in model.parameters()]
    for attempt in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            outputs = sg.outputs(model, TOKENS, chunk=7)
            loss = outputs.float().square().sum() * 10
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(bool(p.grad.isfinite().all()) for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert finite is (attempt == 1)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) is (attempt == 0)
        assert scaler.get_scale() == 8.0  # it went back once
        optimizer.zero_grad()


@every_model
@every_schedule
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 70, -1])
def test_an_infinite_adjoint_goes_through_every_kind_of_state(
    build: Callable[[], Built], schedule: sg.Schedule, number: float, where: int
) -> None:
    """One step has it; every parameter that would have infinite or NaN gradients in plain PyTorch has them here."""
    model, inputs, _ = build()
    chunked, whole = sg.outputs(model, inputs, chunk=26, schedule=schedule), model(inputs, model.initial_state(2))[0]
    found = []
    for outputs in (chunked, whole):
        cotangent = torch.ones_like(outputs)
        cotangent[:, where] = number
        outputs.backward(cotangent)
        found.append({name: p.grad for name, p in model.named_parameters() if is_floating(p.grad)})
        model.zero_grad()
    got, expected = ({name: bool(g.isfinite().all()) for name, g in one.items()} for one in found)
    assert got == expected
    assert not all(got.values())
