"""The graph behind `sg.outputs`: what it holds and lets go of, what it refuses, which hooks run, and when."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from benchmarks.measure import LiveBytes
from torch import Tensor, nn

import slimgrad as sg
from tests.call.test_outputs import SCHEDULES, TOKENS, gradients, plain, projected, require_equal
from tests.contract.cases import CASES, Built
from tests.toy_models import AllKinds, GatedRecurrence

every_model = pytest.mark.parametrize("build", [build for _, build in CASES], ids=[name for name, _ in CASES])
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def model() -> AllKinds:
    torch.manual_seed(5)
    return AllKinds().double()


# --- what it holds ---


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What torch loads at the first call under a dispatch mode keeps that call's frames until a collection."""
    with LiveBytes():
        sg.outputs(model(), TOKENS, chunk=20)
    gc.collect()


@contextmanager
def no_collector() -> Generator[None]:
    """Within the block, what lies in a cycle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@every_model
@every_schedule
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_waits_for_the_collector(build: Callable[[], Built], schedule: sg.Schedule, backward: bool) -> None:
    """States, buffers and outputs are gone as soon as nobody has the outputs, gone back over or not."""
    a_model, inputs, _ = build()
    with no_collector(), LiveBytes() as live:
        outputs = sg.outputs(a_model, inputs, chunk=32, schedule=schedule)
        held = live.live
        if backward:
            outputs.square().mean().backward()
            a_model.zero_grad()
        node = weakref.ref(outputs.grad_fn)
        assert node() is not None
        del outputs
        assert node() is None
        assert live.live == 0
    assert held > 0


@every_schedule
def test_outputs_that_are_kept_hold_nothing_after_their_backward(schedule: sg.Schedule) -> None:
    """Neither states, nor gathered gradients, nor what was passed."""
    gated = GatedRecurrence(width=64)
    with no_collector(), LiveBytes() as live:
        tokens = TOKENS.clone()
        given = weakref.ref(tokens)
        outputs = sg.outputs(gated, tokens, chunk=2, schedule=schedule)
        states = live.live - outputs.nbytes - tokens.nbytes
        outputs.sum().backward()
        gated.zero_grad()
        del tokens
        assert given() is None
        assert live.live == outputs.nbytes
    assert states > (20 * 2 * 64 * 4 if isinstance(schedule, sg.Keep | sg.Rebuild) else 2 * 64 * 4)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_plain_pass_keeps_no_states(without: Callable[[], Any]) -> None:
    gated, held = GatedRecurrence(width=64), []
    with no_collector(), LiveBytes() as live:
        with without():
            outputs = sg.outputs(gated, TOKENS, chunk=2, on_chunk=lambda event: held.append(event.held_bytes))
        assert live.live == outputs.nbytes
    assert len(held) == 20
    assert max(held) == held[0] == 2 * 64 * 4 + 8  # the live state, its counter of positions


def test_cycles_do_not_pile_up_chunk_by_chunk() -> None:
    """What Python must collect after a call does not grow with the number of chunks."""
    found = []
    for chunk in (20, 4, 1):
        with no_collector():
            outputs = sg.outputs(model(), TOKENS, chunk=chunk)
            outputs.sum().backward()
            del outputs
            found.append(gc.collect())
    assert found[0] == found[1] == found[2] < 200


# --- what it refuses ---


def test_a_second_backward() -> None:
    swept = model()
    outputs = sg.outputs(swept, TOKENS, chunk=7)
    loss = projected(outputs)
    loss.backward(retain_graph=True)
    got = {name: p.grad.clone() for name, p in swept.named_parameters()}
    for again in (lambda: loss.backward(), lambda: outputs.sum().backward(), lambda: outputs[:, -1].sum().backward()):
        with pytest.raises(sg.ConsumedError, match="backward was called a second time"):
            again()
    assert all(torch.equal(p.grad, got[name]) for name, p in swept.named_parameters())


def test_a_loss_on_each_of_two_leaves() -> None:
    """One backward for both: the sum of them."""

    class Two(AllKinds):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
            y, state = super().forward(inputs, state)
            return (y, y.square()), state

    first, second = sg.outputs(Two(), TOKENS, chunk=7)
    first.sum().backward()
    with pytest.raises(sg.ConsumedError, match="add losses up before calling it"):
        second.sum().backward()


def test_gradients_of_gradients() -> None:
    swept = model()
    loss = sg.outputs(swept, TOKENS, chunk=7).square().sum()
    found = torch.autograd.grad(loss, list(swept.parameters()), create_graph=True)
    with pytest.raises(sg.SweepError, match="differentiated again"):
        sum(g.square().sum() for g in found).backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        sg.outputs(swept, TOKENS, chunk=7).square().sum().backward(create_graph=True)
    with pytest.raises(sg.SweepError, match="differentiated again"):
        swept.head.weight.grad.sum().backward()
    swept.zero_grad()


@pytest.mark.parametrize(
    "sweep",
    [
        lambda swept: sg.loss(swept, TOKENS, chunk=7),
        lambda swept: sg.token_loss(swept, TOKENS, chunk=7).sum(),
        lambda swept: sg.outputs(swept, TOKENS, chunk=7).sum(),
    ],
    ids=["loss", "token_loss", "outputs"],
)
def test_a_gradient_penalty_is_refused(sweep: Callable[[AllKinds], Tensor]) -> None:
    """What comes into these is a constant: a gradient of it would be a constant too, and the penalty add nothing."""
    swept = model()
    found = torch.autograd.grad(sweep(swept), list(swept.parameters()), create_graph=True)
    once = torch.autograd.grad(sweep(swept), list(swept.parameters()))
    assert all(torch.equal(g, h) for g, h in zip(found, once, strict=True))
    with pytest.raises(sg.SweepError, match="differentiated again"):
        (sweep(swept) + sum(g.square().sum() for g in found)).backward()
    with pytest.raises(sg.SweepError, match="differentiated again"):
        torch.autograd.grad(found[0].sum(), list(swept.parameters()), allow_unused=True)  # as torch's hvp asks


@pytest.mark.parametrize("sweep", [sg.loss, sg.token_loss], ids=["loss", "token_loss"])
def test_a_trained_head_over_a_frozen_model_is_refused(sweep: Callable[..., Tensor]) -> None:
    """Its gradient would be lost without a word: nothing that was given requires one."""
    frozen, head = model().requires_grad_(False), nn.Linear(13, 13).double()

    def loss_fn(y: Tensor, targets: Tensor) -> Tensor:
        losses = head(y).square().sum(-1)
        return losses if sweep is sg.token_loss else losses.sum()

    with pytest.raises(sg.ModelError, match="a trainable parameter beside them"):
        sweep(frozen, TOKENS, chunk=7, loss_fn=loss_fn)
    with torch.no_grad():
        found = sweep(frozen, TOKENS, chunk=7, loss_fn=loss_fn)
    head.requires_grad_(False)
    assert torch.equal(found, sweep(frozen, TOKENS, chunk=7, loss_fn=loss_fn))


def test_a_frozen_model_that_reads_a_trained_prompt_is_refused() -> None:
    prompt = nn.Parameter(torch.ones((), dtype=torch.float64))

    class Prompted(AllKinds):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
            y, state = super().forward(inputs, state)
            return y * prompt, state

    with pytest.raises(sg.ModelError, match="a trainable parameter beside them"):
        sg.outputs(Prompted().double().requires_grad_(False), TOKENS, chunk=7)


def _step(swept: AllKinds, tokens: Tensor) -> None:
    torch.optim.SGD(swept.parameters(), lr=0.1).step()


def _write_to_tokens(swept: AllKinds, tokens: Tensor) -> None:
    tokens[0, 3] += 1


def _write_beside_torch(swept: AllKinds, tokens: Tensor) -> None:
    swept.head.bias.data.add_(1)


def _replace(swept: AllKinds, tokens: Tensor) -> None:
    swept.head.bias = nn.Parameter(swept.head.bias.detach().clone())


CHANGES = [
    (_step, sg.ConsumedError, "a parameter, an input, a target or a state was modified"),
    (_write_to_tokens, sg.ConsumedError, "a parameter, an input, a target or a state was modified"),
    (_write_beside_torch, sg.LossMismatchError, "came out differently"),
    (_replace, sg.ConsumedError, r"a parameter of the model was replaced .*\(bias\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), CHANGES, ids=[case[0].__name__.strip("_") for case in CHANGES])
def test_what_changed_in_between(change: Callable, error: type[Exception], message: str) -> None:
    swept, tokens = model(), TOKENS.clone() % 12
    swept.head.bias.grad = torch.full_like(swept.head.bias, 0.5)
    outputs = sg.outputs(swept, tokens, chunk=7)
    change(swept, tokens)
    with pytest.raises(error, match=message):
        outputs.sum().backward()
    assert all(p.grad is None for name, p in swept.named_parameters() if name != "head.bias")
    swept.zero_grad()  # an error costs the graph, not the model
    got = gradients(swept, projected(sg.outputs(swept, tokens, chunk=7)))
    require_equal(got, gradients(swept, projected(plain(swept, tokens))))


def test_changed_by_a_step_from_the_same_gradients() -> None:
    """Clipping, and then a step, between a backward and the next call, as every loop does."""
    swept, whole = model(), model()
    for a_model, of in ((swept, lambda m: sg.outputs(m, TOKENS, chunk=7)), (whole, lambda m: plain(m, TOKENS))):
        optimizer = torch.optim.SGD(a_model.parameters(), lr=0.5)
        for _ in range(3):
            projected(of(a_model)).backward()
            nn.utils.clip_grad_norm_(a_model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(swept.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # measured: 2e-15


def test_within_a_chunk_of_another_sweep() -> None:
    class Nested(AllKinds):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
            sg.outputs(inner, inputs, chunk=3)
            return super().forward(inputs, state)

    inner = model()
    with pytest.raises(sg.SweepError, match="started inside a chunk of another"):
        sg.outputs(Nested(), TOKENS, chunk=7)


# --- how it is gone through ---


def test_hooks_on_parameters_fire_once_for_all_graphs() -> None:
    """Two sequences in one loss: each parameter's hooks see the sum of both, once."""
    swept, fired, seen = model(), {}, {}
    expected = gradients(swept, projected([plain(swept, TOKENS), plain(swept, TOKENS[:, :20])]))
    for name, p in swept.named_parameters():
        p.register_hook(lambda g, name=name: seen.update({name: g.clone()}))
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.update({name: fired.get(name, 0) + 1}))
    loss = projected([sg.outputs(swept, TOKENS, chunk=7), sg.outputs(swept, TOKENS[:, :20], chunk=7)])
    loss.backward()
    assert fired == dict.fromkeys(expected, 1)
    require_equal(seen, expected)


def test_gradients_accumulate() -> None:
    swept = model()
    expected = gradients(swept, projected(plain(swept, TOKENS)))
    for _ in range(3):
        projected(sg.outputs(swept, TOKENS, chunk=7)).backward()
    got = {name: p.grad for name, p in swept.named_parameters()}
    require_equal(got, {name: 3 * g for name, g in expected.items()})


def test_a_gradient_that_is_handed_in() -> None:
    """`outputs.backward(g)`, as whoever computes the loss in tiles calls it; hooks on the outputs see and change it."""
    swept = model()
    whole = plain(swept, TOKENS).detach().requires_grad_()
    projected(whole).backward()
    expected = gradients(swept, projected(plain(swept, TOKENS)))
    outputs = sg.outputs(swept, TOKENS, chunk=7)
    outputs.retain_grad()
    outputs.register_hook(lambda g: 2 * g)
    outputs.backward(whole.grad / 2)
    torch.testing.assert_close(outputs.grad, whole.grad, rtol=0, atol=0)
    require_equal({name: p.grad for name, p in swept.named_parameters()}, expected)


def test_gradients_of_some_and_of_the_outputs_alone() -> None:
    """`torch.autograd.grad` leaves `.grad` alone; for the outputs no sweep is needed, and none is used up."""
    swept = model()
    expected = gradients(swept, projected(plain(swept, TOKENS)))
    outputs, events = sg.outputs(swept, TOKENS, chunk=7), []
    loss = projected(outputs)
    torch.autograd.grad(loss, outputs, retain_graph=True)
    assert not events
    names = ["embed.weight", "conv.bias"]
    found = torch.autograd.grad(loss, [swept.get_parameter(name) for name in names])
    require_equal(dict(zip(names, found, strict=True)), {name: expected[name] for name in names})
    assert all(p.grad is None for p in swept.parameters())


def test_events_of_both_sweeps() -> None:
    events: list[sg.Event] = []
    outputs = sg.outputs(model(), TOKENS, chunk=15, on_chunk=events.append)
    outputs.sum().backward()
    spans = [(0, 15), (15, 30), (30, 41)]
    assert [(e.phase, e.start, e.stop) for e in events if e.phase != "again"] == [
        *(("forward", *span) for span in spans),
        *(("reverse", *span) for span in spans[::-1]),
    ]
    assert all(e.loss is None and e.length == 41 for e in events)


def test_backward_in_another_thread() -> None:
    swept, failed = model(), []
    expected = gradients(swept, projected(plain(swept, TOKENS)))
    loss = projected(sg.outputs(swept, TOKENS, chunk=7))

    def run() -> None:
        try:
            loss.backward()
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
    require_equal({name: p.grad for name, p in swept.named_parameters()}, expected)


def test_within_checkpointing_and_offloading() -> None:
    """Around a call: what it saves for backward are the parameters, whoever keeps them."""
    swept = model()
    expected = gradients(swept, projected(plain(swept, TOKENS)))

    def call() -> Tensor:
        return projected(sg.outputs(swept, TOKENS, chunk=7))

    require_equal(gradients(swept, torch.utils.checkpoint.checkpoint(call, use_reentrant=False)), expected)
    with torch.autograd.graph.save_on_cpu():
        loss = call()
    require_equal(gradients(swept, loss), expected)
