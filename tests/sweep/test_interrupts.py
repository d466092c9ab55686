"""An interrupt at any point leaves `.grad`, the model and the generator as they were before the call."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from tests.toy_models import AllKinds

TOKENS = torch.arange(2 * 20).reshape(2, 20) * 7 % 13


@pytest.fixture(autouse=True)
def _python_hears_the_keyboard() -> Iterator[None]:
    """A process started in the background ignores SIGINT, and Python then installs no handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Everything(AllKinds):
    """All kinds of state, a recurrent layer with its second list of weights, a buffer, dropout; some of it frozen."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.summed.bias.requires_grad_(False)
        self.bombs: Iterator[int] | None = None

    def initial_state(self, batch_size: int) -> Any:
        return super().initial_state(batch_size) | {"rnn": self.head.weight.new_zeros(1, batch_size, 6)}

    def forward(self, inputs: Tensor, state: Any) -> Any:
        if self.bombs is not None and next(self.bombs) == 0:
            raise KeyboardInterrupt
        outputs, following = super().forward(inputs, {name: x for name, x in state.items() if name != "rnn"})
        x, rnn = self.rnn(self.embed(inputs) * self.scale, state["rnn"])
        return outputs + self.head(x), following | {"rnn": rnn}


def standing(model: nn.Module) -> tuple:
    """Everything about a model that a call must not change, by identity and by value."""
    places = [
        (name, key, id(x), type(x), x.requires_grad, x._version, id(x.grad), None if x.grad is None else x.grad.clone())
        for name, module in model.named_modules()
        for key, x in (*module._parameters.items(), *module._buffers.items())
    ]
    flat = [id(w) for w in model.rnn._flat_weights]
    grads = [p[-1] for p in places]
    return [p[:-1] for p in places], flat, grads, torch.get_rng_state(), model.training


def require_as_before(before: tuple, after: tuple, *, draws: int = 1) -> None:
    assert before[0] == after[0]
    assert before[1] == after[1]
    for b, a in zip(before[2], after[2], strict=True):
        assert (b is None) == (a is None)
        assert b is None or torch.equal(b, a)
    assert before[4] == after[4]
    torch.set_rng_state(before[3])
    for _ in range(draws):  # the one draw of a call: its seed
        torch.randint(-(1 << 63), (1 << 63) - 1, ())
    assert torch.equal(torch.get_rng_state(), after[3])


def prepared() -> Everything:
    torch.manual_seed(11)
    model = Everything().train()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    return model


def expected_gradients(schedule: sg.Schedule) -> list[Tensor | None]:
    model = prepared()
    torch.manual_seed(12)
    sg.backward(model, TOKENS, chunk=6, schedule=schedule)
    return [p.grad for p in model.parameters()]


def require_the_next_call_works(model: Everything, schedule: sg.Schedule, expected: list[Tensor | None]) -> None:
    torch.manual_seed(12)
    sg.backward(model, TOKENS, chunk=6, schedule=schedule)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def interrupted(model: Everything, call: Callable[[], object], schedule: sg.Schedule, expected: Any) -> bool:
    """Whether the call was interrupted; if so, that nothing of it is left."""
    before = standing(model)
    try:
        call()
    except KeyboardInterrupt:
        model.bombs = None
        require_as_before(before, standing(model))
        require_the_next_call_works(model, schedule, expected)
        return True
    return False


SCHEDULES = [sg.Rebuild(), sg.Binomial(2)]
STRIDE = 97  # of about 8,000 calls; with 5 it was tried once by hand


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_interrupts_from_on_chunk(way: str, schedule: sg.Schedule) -> None:
    expected, count = expected_gradients(schedule), 0
    while True:
        model, left = prepared(), iter(range(count, -1, -1))

        def on_chunk(event: sg.Event, left: Iterator[int] = left) -> None:
            if next(left, 1) == 0:
                raise KeyboardInterrupt

        if not interrupted(model, lambda: call(way, model, schedule, on_chunk=on_chunk), schedule, expected):  # noqa: B023
            break
        count += 1
    assert count == (schedule.num_advances(4) + 4 + (way == "loss"))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_interrupts_from_the_model_and_from_the_loss(way: str, schedule: sg.Schedule) -> None:
    expected = expected_gradients(schedule)
    counts = []
    for place in ("model", "loss"):
        count = 0
        while True:
            model, left = prepared(), iter(range(count, -1000, -1))
            model.bombs = left if place == "model" else None

            def loss_fn(outputs: Tensor, targets: Tensor, left: Iterator[int] = left, place: str = place) -> Tensor:
                if place == "loss" and next(left) == 0:
                    raise KeyboardInterrupt
                return torch.nn.functional.cross_entropy(
                    outputs.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
                )

            if not interrupted(model, lambda: call(way, model, schedule, loss_fn=loss_fn), schedule, expected):  # noqa: B023
                break
            count += 1
        counts.append(count)
    runs = schedule.num_advances(4) + 4 + (way == "loss") + 1  # the first chunk again: an attribute changed (`bombs`)
    # of the loss: chunks, and the first one's tokens a few times, to see whether it adds up
    assert counts == [runs, 4 + 4 if way == "backward" else 8 + 6]


def call(way: str, model: nn.Module, schedule: sg.Schedule, **options: Any) -> None:
    if way == "backward":
        sg.backward(model, TOKENS, chunk=6, schedule=schedule, **options)
    else:
        sg.loss(model, TOKENS, chunk=6, schedule=schedule, **options).backward()


# Python itself swallows an interrupt that comes inside the finalizer of a generator; pytest would call that an error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_real_signal_at_any_call() -> None:
    """SIGINT as a function is entered, be it slimgrad's, torch's or contextlib's: where Python looks for signals."""
    schedule, expected = sg.Rebuild(), expected_gradients(sg.Rebuild())
    calls = 0

    def swept(model: Everything, fire_at: int | None) -> None:
        nonlocal calls
        calls = 0

        def trace(frame: Any, event: str, arg: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == fire_at:
                os.kill(os.getpid(), signal.SIGINT)

        sys.settrace(trace)
        try:
            sg.backward(model, TOKENS, chunk=6, schedule=schedule)
        finally:
            sys.settrace(None)

    swept(prepared(), None)
    total, stopped, finished = calls, 0, 0
    assert total > 2000
    for fire_at in range(1, total, STRIDE):
        model = prepared()
        before = standing(model)
        torch.manual_seed(12)
        drawn = torch.get_rng_state()
        try:
            swept(model, fire_at)
        except KeyboardInterrupt:
            stopped += 1
        after = standing(model)
        assert before[0] == after[0], f"call {fire_at} of {total}"
        assert before[1] == after[1], f"call {fire_at} of {total}"
        if any(b is not None and not torch.equal(b, a) for b, a in zip(before[2], after[2], strict=True)):
            finished += 1  # the signal came while gradients were being delivered, or later: then all are there
            for p, g in zip(model.parameters(), expected, strict=True):
                assert g is None or torch.equal(p.grad, g), f"call {fire_at} of {total}"
            continue
        states = [drawn]
        torch.set_rng_state(drawn)
        torch.randint(-(1 << 63), (1 << 63) - 1, ())
        states.append(torch.get_rng_state())
        assert any(torch.equal(after[3], state) for state in states), f"call {fire_at} of {total}"
        require_the_next_call_works(model, schedule, expected)
    assert stopped > 50
    assert finished >= 1


def test_a_signal_during_delivery_waits_until_all_is_delivered() -> None:
    model, expected = prepared(), expected_gradients(sg.Rebuild())
    for name, p in model.named_parameters():
        if name == "conv.weight":
            p.register_post_accumulate_grad_hook(lambda p: os.kill(os.getpid(), signal.SIGINT))
    torch.manual_seed(12)
    with pytest.raises(KeyboardInterrupt):
        sg.backward(model, TOKENS, chunk=6, schedule=sg.Rebuild())
    for p, g in zip(model.parameters(), expected, strict=True):
        assert g is None or torch.equal(p.grad, g)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_handlers_of_the_user_stay() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        model = prepared()
        model.head.bias.register_post_accumulate_grad_hook(lambda p: os.kill(os.getpid(), signal.SIGTERM))
        sg.backward(model, TOKENS, chunk=6)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_call() -> None:
    """Signals are the main thread's alone; the call works elsewhere, and two threads do not disturb each other."""
    model, errors = prepared(), []

    def work() -> None:
        try:
            sg.backward(model, TOKENS, chunk=6)
        except BaseException as error:  # noqa: BLE001  (to be shown in the main thread)
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert not torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
