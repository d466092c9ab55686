"""The contract of `tests/contract`, on the device: chunked equals Algorithm 1 equals plain, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import slimgrad as sg
from tests import toy_models
from tests.contract import contract, kinds
from tests.contract.cases import BATCH, CASES, LENGTH, tokens
from tests.contract.test_kinds import KINDS, name_of
from tests.cuda.device import DEVICE, MODELS, PLACES, SCHEDULES, every_model, moved, on_device

OWN_DEVICE = ("gated", "cached", "signals", "gates in blocks", "window", "cache", "performer")


@every_model
@pytest.mark.parametrize("from_state", [False, True], ids=["own state", "given state"])
@pytest.mark.parametrize("way", contract.WAYS)
def test_every_way_in(name: str, way: str, from_state: bool) -> None:
    contract.check(on_device(MODELS[name]), chunk=9, way=way, from_state=from_state)


@every_model
@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_place(name: str, schedule: str, store: str) -> None:
    contract.check(on_device(MODELS[name]), chunk=16, schedule=SCHEDULES[schedule](store=store))


@pytest.mark.parametrize("name", ["cached", "all kinds", "cache"])
@pytest.mark.parametrize("rows", ["host", "disk"])
@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_rows_elsewhere(name: str, rows: str, way: str, batch: int) -> None:
    """One sequence alone is contiguous in pinned memory, so that it is copied without waiting; several are not."""

    def build() -> Any:
        model, inputs, targets = on_device(MODELS[name])()
        return model, inputs[:batch], targets

    for schedule in (sg.Rebuild(rows=rows), sg.Binomial(3, rows=rows, store=rows)):
        contract.check(build, chunk=11, schedule=schedule, way=way)


@every_model
@pytest.mark.parametrize("chunk", [1, 64, LENGTH - 1, LENGTH])
def test_chunks(name: str, chunk: int) -> None:
    contract.check(on_device(MODELS[name]), chunk=chunk)


@every_model
def test_a_state_that_is_carried_on(name: str) -> None:
    contract.check_carried(on_device(MODELS[name]), cuts=[58], chunks=[8, 11])


@pytest.mark.parametrize("name", [name for name, _ in CASES if name in OWN_DEVICE])
@pytest.mark.parametrize("store", PLACES)
def test_leaves_of_the_state_on_two_devices(name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters that the model left on the CPU."""
    monkeypatch.setattr(toy_models, "torch", torch)
    contract.check(on_device(MODELS[name]), chunk=16, schedule=sg.Keep(store=store))


class HalfOnTheCpu(toy_models.GatedRecurrence):
    """A floating state that the model keeps on the CPU, beside one on the device."""

    def initial_state(self, batch_size: int) -> Any:
        return super().initial_state(batch_size) | {"mean": torch.zeros(batch_size, 6, dtype=torch.float64)}

    def forward(self, inputs: Any, state: Any) -> Any:
        outputs, following = super().forward(inputs, state)
        mean = 0.9 * state["mean"] + following["h"].to(state["mean"])
        return outputs + self.head(mean.to(outputs))[:, None], following | {"mean": mean}


@pytest.mark.parametrize("way", ["backward", "loss"])
def test_floating_states_on_two_devices(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_models, "torch", torch)
    torch.manual_seed(1)
    model, inputs = HalfOnTheCpu().to(DEVICE, torch.float64), moved(tokens())
    norms: list[Any] = []

    def call(chunk: int) -> Any:
        if way == "backward":
            loss = sg.backward(model, inputs, chunk=chunk, on_chunk=lambda event: norms.append(event.adjoint_norm)).loss
        else:
            loss = sg.loss(model, inputs, chunk=chunk)
            loss.backward()
        return loss.detach(), contract.collect(model, None, None)

    targets = contract.explicit(inputs, None)
    _, expected = contract.specified(model, inputs, targets, chunk=16)
    error, name = contract.worst_error(call(16)[1], contract.without_state((torch.zeros(()), expected))[1])
    assert error <= contract.TOLERANCE, (name, error)
    assert way == "loss" or all(norm > 0 for norm in norms[-3:-1])


@pytest.mark.parametrize("way", ["backward", "loss", "outputs"])
@pytest.mark.parametrize("name", ["gated", "all kinds", "linear attention"])
def test_inputs_in_host_memory(name: str, way: str) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    expected = contract.plain(model, inputs, targets)
    if way == "outputs":
        found = sg.outputs(model, inputs.cpu(), chunk=9)
        loss = contract.plain_loss(found, contract.explicit(inputs, targets))
        loss.backward()
        got = loss.detach(), contract.collect(model, None, None)
    else:
        got = contract.chunked(way, model, inputs.cpu(), targets, chunk=9)
    contract.require_close(contract.without_state(got), contract.without_state(expected))


@pytest.mark.parametrize("where", ["device", "host"])
def test_floating_inputs_take_gradients(where: str) -> None:
    model, inputs, targets = on_device(MODELS["signals"])()
    expected = contract.plain(model, inputs, targets)
    given = inputs if where == "device" else {side: x.cpu() for side, x in inputs.items()}
    got = contract.chunked("backward", model, given, targets, chunk=9)
    assert {g.device.type for name, g in got[1].items() if name.startswith("input")} <= {DEVICE.type, "cpu"}
    got = got[0], {name: g.to(DEVICE) for name, g in got[1].items()}
    contract.require_close(got, expected)


@pytest.mark.parametrize("way", ["backward", "loss"])
@pytest.mark.parametrize("name", ["gated", "cached", "all kinds", "linear attention", "performer"])
def test_documents(name: str, way: str) -> None:
    """A list of sequences: the sum of their gradients, over all targets."""
    model, inputs, _ = on_device(MODELS[name])()
    documents = [inputs[0, :50], inputs[0, 50:63], inputs[1, :101]]
    count = sum(len(x) - 1 for x in documents)
    total, expected = 0.0, None
    for x in documents:
        loss, found = contract.without_state(contract.plain(model, x[None], None))
        part = {n: g * (len(x) - 1) / count for n, g in found.items()}
        total = total + loss * (len(x) - 1) / count
        expected = part if expected is None else {n: g + expected[n] for n, g in part.items()}
    if way == "backward":
        loss = sg.backward(model, documents, chunk=16).loss
    else:
        loss = sg.loss(model, documents, chunk=16)
        loss.backward()
    contract.require_close((loss.detach(), contract.collect(model, None, None)), (total, expected))


@pytest.mark.parametrize("check", [check for check, _ in KINDS], ids=name_of)
def test_right_or_refused_by_name(check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of `contract.kinds`, where whatever is made with no word of a device is made on this one."""
    monkeypatch.setattr(kinds, "TOKENS", moved(kinds.TOKENS))
    with DEVICE:
        check()


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_under_a_default_device(way: str, store: str) -> None:
    model, inputs, targets = on_device(MODELS["all kinds"])()  # its weights drawn as ever
    expected = contract.without_state(contract.plain(model, inputs, targets))
    torch.set_default_device(DEVICE)
    try:
        got = contract.chunked(way, model, inputs, targets, chunk=9, schedule=sg.Binomial(3, store=store, rows=store))
    finally:
        torch.set_default_device(None)
    contract.require_close(contract.without_state(got), expected)


def test_losses_and_gradients_are_on_the_device() -> None:
    model, inputs, targets = on_device(MODELS["all kinds"])()
    result = sg.backward(model, inputs, targets, chunk=9, schedule=sg.Keep(store="host", rows="host"))
    leaves = [result.loss, *map(contract.raw, torch.utils._pytree.tree_leaves(result.final_state))]
    leaves += [p.grad for p in model.parameters()]
    assert {x.device.type for x in leaves if x is not None} == {DEVICE.type}
    losses = sg.token_loss(model, inputs, targets, chunk=9)
    assert losses.device.type == DEVICE.type


def test_evaluate() -> None:
    for name in ("gated", "all kinds", "performer"):
        model, inputs, targets = on_device(MODELS[name])()
        with torch.no_grad():
            outputs, _ = model(inputs, model.initial_state(BATCH))
        expected = contract.plain_loss(outputs, contract.explicit(inputs, targets))
        found = sg.evaluate(model, inputs, targets, chunk=9).loss
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
