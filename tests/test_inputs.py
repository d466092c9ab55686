"""What may be given to the face: lengths, targets, trees, lists, context, normalisers, losses of one's own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.sweep.schedules import default
from tests.contract.contract import collect, explicit, plain, require_close, worst_error
from tests.toy_models import MODELS, AllKinds, CachedAttention, GatedRecurrence, LinearAttention, Signals

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
LANGUAGE_MODELS = [model for name, model in MODELS.items() if name != "signals"]
every_language_model = pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
WAYS = ("backward", "loss")


def run(way: str, model: nn.Module, *args: Any, **options: Any) -> Tensor:
    """The loss; gradients are in `.grad`."""
    if way == "backward":
        return sg.backward(model, *args, **options).loss
    loss = sg.loss(model, *args, **options)
    loss.backward()
    return loss.detach()


def parameters_only(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in found.items() if not name.startswith("state")}


def require_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    error, name = worst_error(got, expected)
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured at most 6e-16 in this file


@every_language_model
@pytest.mark.parametrize(("batch", "time", "chunk"), [(1, 1, 4), (3, 1, 1), (1, 5, 9), (5, 17, 4), (1, 2, 1)])
def test_any_batch_length_and_chunk(model_type: type[nn.Module], batch: int, time: int, chunk: int) -> None:
    model = model_type().double()
    tokens = torch.randint(0, 13, (batch, time))
    targets = torch.randint(0, 13, (batch, time))
    loss, expected = plain(model, tokens, targets)
    for way in WAYS:
        got = run(way, model, tokens, targets, chunk=chunk)
        require_close((got, collect(model, None, None)), (loss, parameters_only(expected)))


@every_language_model
@pytest.mark.parametrize("way", WAYS)
def test_all_targets_of_a_chunk_ignored(model_type: type[nn.Module], way: str) -> None:
    model, targets = model_type().double(), explicit(TOKENS, None)
    targets[:, 7:14] = targets[:, 28:] = -100
    loss, expected = plain(model, TOKENS, targets)
    got = run(way, model, TOKENS, targets, chunk=7)
    require_close((got, collect(model, None, None)), (loss, parameters_only(expected)))


@every_language_model
@pytest.mark.parametrize("way", WAYS)
def test_all_targets_ignored(model_type: type[nn.Module], way: str) -> None:
    model = model_type()
    assert float(run(way, model, TOKENS, torch.full_like(TOKENS, -100), chunk=7)) == 0.0
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())
    assert sg.evaluate(model, TOKENS, torch.full_like(TOKENS, -100), chunk=7).num_targets == 0


def test_one_token_has_no_next_token() -> None:
    result = sg.backward(GatedRecurrence(), TOKENS[:, :1], chunk=4)
    assert (float(result.loss), result.num_targets) == (0.0, 0)


@every_language_model
def test_right_padding_is_exact(model_type: type[nn.Module]) -> None:
    """Sequences of 40, 26 and 9 tokens, padded and in one batch, equal the three alone."""
    model, lengths = model_type().double(), (40, 26, 9)
    tokens = torch.randint(0, 13, (3, 40))
    targets = explicit(tokens, None)
    for row, length in enumerate(lengths):
        targets[row, length - 1 :] = -100
    count = sum(lengths) - 3
    for row, length in enumerate(lengths):
        outputs, _ = model(tokens[row : row + 1, :length], model.initial_state(1))
        (F.cross_entropy(outputs[0, :-1], tokens[row, 1:length], reduction="sum") / count).backward()
    expected = collect(model, None, None)
    result = sg.backward(model, tokens, targets, chunk=7)
    assert result.num_targets == count
    require_same(collect(model, None, None), expected)


@every_language_model
@pytest.mark.parametrize("way", WAYS)
def test_a_list_of_sequences_has_one_normaliser(model_type: type[nn.Module], way: str) -> None:
    model = model_type().double()
    documents = [torch.randint(0, 13, (length,)) for length in (23, 1, 8, 14)]
    count = 22 + 0 + 7 + 13
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        outputs, _ = model(document[None], model.initial_state(1))
        total = total + F.cross_entropy(outputs[0, :-1], document[1:], reduction="sum") / count
    total.backward()
    expected = total.detach(), collect(model, None, None)
    require_close((run(way, model, documents, chunk=5), collect(model, None, None)), expected)


def test_results_of_a_list_are_lists() -> None:
    model = GatedRecurrence().double()
    documents = [TOKENS[:, :9], TOKENS[:1, 9:]]
    result = sg.backward(model, documents, chunk=4)
    assert [state["h"].shape[0] for state in result.final_state] == [2, 1]
    assert [gradient["h"].shape[0] for gradient in result.initial_state_grad] == [2, 1]
    assert result.input_grads == [None, None]
    # states of a list are lists too
    again = sg.backward(model, documents, chunk=4, state=result.final_state, final_state_grad=result.initial_state_grad)
    assert float(again.loss) != float(result.loss)
    with pytest.raises(sg.InputError, match="inputs is a list of 2 sequences: expected a list of 2, got dict"):
        sg.backward(model, documents, chunk=4, state=result.final_state[0])
    with pytest.raises(sg.InputError, match="expected a list of 2, got a list of 1"):
        sg.backward(model, documents, [TOKENS[:, :9]], chunk=4)
    with pytest.raises(sg.InputError, match="inputs is an empty list"):
        sg.backward(model, [], chunk=4)


def test_token_losses_of_a_list_are_a_list() -> None:
    model = GatedRecurrence().double()
    losses = sg.token_loss(model, [TOKENS[0], TOKENS[1, :11]], chunk=4)
    assert [tuple(x.shape) for x in losses] == [(1, 40), (1, 11)]
    weights = [torch.rand(1, 40, dtype=torch.float64), torch.rand(1, 11, dtype=torch.float64)]
    sum((w * x).sum() for w, x in zip(weights, losses, strict=True)).backward()
    got = collect(model, None, None)
    for tokens, weight in zip((TOKENS[:1], TOKENS[1:, :11]), weights, strict=True):
        outputs, _ = model(tokens, model.initial_state(1))
        each = F.cross_entropy(outputs[0], explicit(tokens, None)[0], reduction="none", ignore_index=-100)
        (weight[0] * each).sum().backward()
    require_same(got, collect(model, None, None))


def test_token_losses_may_be_weighed_one_by_one() -> None:
    model = AllKinds().double()
    targets = explicit(TOKENS, None)
    weights = torch.randn(2, 40, dtype=torch.float64)
    losses = sg.token_loss(model, TOKENS, chunk=7)
    outputs, _ = model(TOKENS, model.initial_state(2))
    each = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(losses, each, rtol=1e-13, atol=1e-15)  # measured 3e-16
    assert bool((losses[:, -1] == 0).all())
    (weights * losses).sum().backward()
    got = collect(model, None, None)
    (weights * each).sum().backward()
    require_same(got, collect(model, None, None))


@pytest.mark.parametrize("way", WAYS)
def test_floating_inputs_take_gradients_where_they_ask(way: str) -> None:
    model = Signals().double()
    left = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    right = torch.randn(2, 20, 3, dtype=torch.float64)
    targets = torch.randint(0, 5, (2, 20))
    outputs, _ = model({"left": left, "right": right}, model.initial_state(2))
    F.cross_entropy(outputs.flatten(0, 1), targets.flatten()).backward()
    expected, left.grad = collect(model, None, None) | {"left": left.grad}, None
    run(way, model, {"left": left, "right": right}, targets, chunk=6)
    assert right.grad is None
    require_same(collect(model, None, None) | {"left": left.grad}, expected)
    result = sg.backward(model, {"left": left.detach().requires_grad_(), "right": right}, targets, chunk=6)
    assert result.input_grads["right"] is None
    require_same({"left": result.input_grads["left"]}, {"left": expected["left"]})


@pytest.mark.parametrize("way", WAYS)
def test_inputs_may_be_computed_from_a_graph_they_share(way: str) -> None:
    """Two floating inputs that one encoder made: its graph is gone through once, with both gradients."""
    model, encoder = Signals().double(), nn.Linear(4, 3).double()
    source, targets = torch.randn(2, 20, 4, dtype=torch.float64), torch.randint(0, 5, (2, 20))

    def inputs() -> dict[str, Tensor]:
        x = torch.tanh(encoder(source))
        return {"left": x.exp(), "right": x * 2}

    outputs, _ = model(inputs(), model.initial_state(2))
    F.cross_entropy(outputs.flatten(0, 1), targets.flatten()).backward()
    expected = collect(model, None, None) | collect_of(encoder)
    run(way, model, inputs(), targets, chunk=6)
    require_same(collect(model, None, None) | collect_of(encoder), expected)


def collect_of(encoder: nn.Module) -> dict[str, Tensor]:
    return {f"encoder {name}": g for name, g in collect(encoder, None, None).items()}


class Conditioned(GatedRecurrence):
    """A recurrence that looks at a context: a tensor, or a dict of two."""

    def forward(self, inputs: Tensor, state: Any, context: Any) -> Any:
        outputs, state = super().forward(inputs, state)
        a, b = (context["a"], context["b"]) if isinstance(context, dict) else (context, context)
        attention = torch.softmax(outputs @ a.transpose(1, 2), -1)
        return outputs + attention @ (torch.tanh(b) + a), state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("as_dict", [False, True])
def test_context_takes_gradients(way: str, as_dict: bool) -> None:
    model, source = Conditioned().double(), nn.Linear(3, 13).double()
    given = torch.randn(2, 4, 3, dtype=torch.float64)
    fixed = torch.randn(2, 4, 13, dtype=torch.float64)

    def context() -> Any:
        made = source(given)
        return {"a": made, "b": fixed} if as_dict else made

    outputs, _ = model(TOKENS, model.initial_state(2), context())
    F.cross_entropy(outputs.flatten(0, 1), explicit(TOKENS, None).flatten()).backward()
    expected = collect(model, None, None) | collect_of(source)
    run(way, model, TOKENS, context=context(), chunk=7)
    assert fixed.grad is None
    require_same(collect(model, None, None) | collect_of(source), expected)
    assert len(expected) == len(list(model.parameters())) + 2
    assert sg.evaluate(model, TOKENS, context=context(), chunk=7).loss.grad_fn is None
    assert sg.verify(model, TOKENS, context=context(), chunk=7).passed


@pytest.mark.parametrize("way", WAYS)
def test_context_tensors_that_share_a_graph(way: str) -> None:
    model, source = Conditioned().double(), nn.Linear(3, 13).double()
    given = torch.randn(2, 4, 3, dtype=torch.float64)

    def context() -> Any:
        made = torch.tanh(source(given))
        return {"a": made.exp(), "b": made}

    outputs, _ = model(TOKENS, model.initial_state(2), context())
    F.cross_entropy(outputs.flatten(0, 1), explicit(TOKENS, None).flatten()).backward()
    expected = collect(model, None, None) | collect_of(source)
    run(way, model, TOKENS, context=context(), chunk=7)
    require_same(collect(model, None, None) | collect_of(source), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalizer", [7, 0.5, torch.tensor(3.0), torch.tensor([11])])
def test_normalizers(way: str, normalizer: Any) -> None:
    model = CachedAttention().double()
    loss, expected = plain(model, TOKENS, None)
    factor = 78 / float(normalizer)
    got = run(way, model, TOKENS, chunk=7, normalizer=normalizer)
    assert float(got) == pytest.approx(float(loss) * factor, rel=1e-13)
    require_same(collect(model, None, None), {k: g * factor for k, g in parameters_only(expected).items()})


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (0, "normalizer=0: expected a positive number"),
        (-1.5, "expected a positive number"),
        (float("nan"), "expected a positive number"),
        ("tokens", "normalizer='tokens': expected 'targets', a number or a tensor"),
        (torch.ones(3), r"normalizer: expected one number, got a tensor of shape \[3\]"),
    ],
)
def test_normalizers_that_are_none(normalizer: Any, message: str) -> None:
    with pytest.raises(sg.InputError, match=message):
        sg.backward(GatedRecurrence(), TOKENS, normalizer=normalizer)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_of_ones_own_with_metrics_and_targets_in_a_dict(way: str) -> None:
    model = GatedRecurrence().double()
    targets = {"tokens": explicit(TOKENS, None), "weights": torch.rand(2, 40, dtype=torch.float64)}

    def weighed(outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        each = F.cross_entropy(outputs.transpose(1, 2), targets["tokens"], reduction="none", ignore_index=-100)
        right = (outputs.argmax(-1) == targets["tokens"]).sum()
        return {"loss": (each * targets["weights"]).sum(), "right": right, "squares": outputs.square().sum()}

    outputs, _ = model(TOKENS, model.initial_state(2))
    whole = weighed(outputs, targets)
    (whole["loss"] / 80).backward()  # positions count where targets are not plain integers
    expected = (whole["loss"] / 80).detach(), collect(model, None, None)
    require_close((run(way, model, TOKENS, targets, chunk=7, loss_fn=weighed), collect(model, None, None)), expected)
    result = sg.backward(model, TOKENS, targets, chunk=7, loss_fn=weighed)
    assert set(result.metrics) == {"right", "squares"}
    assert int(result.metrics["right"]) == int(whole["right"])
    assert float(result.metrics["squares"]) == pytest.approx(float(whole["squares"].detach()), rel=1e-13)
    assert not result.metrics["squares"].requires_grad
    torch.testing.assert_close(sg.evaluate(model, TOKENS, targets, chunk=9, loss_fn=weighed).metrics, result.metrics)


def test_two_calls_accumulate_to_their_sum() -> None:
    model = AllKinds().double()
    first, second = TOKENS[:, :19], TOKENS[:, 19:]
    expected: dict[str, Tensor] = {}
    for part in (first, second):
        for name, g in parameters_only(plain(model, part, None)[1]).items():
            expected[name] = expected.get(name, 0) + g
    sg.backward(model, first, chunk=4)
    sg.loss(model, second, chunk=4).backward()
    require_same(collect(model, None, None), expected)


def test_losses_add_up_scale_and_mix_with_other_terms() -> None:
    """What GradScaler and regularisers do: one backward over several chunked losses and a plain term."""
    model, scale = GatedRecurrence().double(), 2.0**16

    def penalty() -> Tensor:
        return sum(p.square().sum() for p in model.parameters())

    parts = [TOKENS[:, :19], TOKENS[:, 19:]]
    expected: dict[str, Tensor] = {}
    for part in parts:
        for name, g in parameters_only(plain(model, part, None)[1]).items():
            expected[name] = expected.get(name, 0) + g * 3 * scale
    (penalty() * scale).backward()
    for name, g in collect(model, None, None).items():
        expected[name] = expected[name] + g
    total = sum(3 * sg.loss(model, part, chunk=4) for part in parts) + penalty()
    (total * scale).backward()
    require_same(collect(model, None, None), expected)


def test_a_grad_scaler_finds_finite_gradients_and_unscales_them() -> None:
    model = GatedRecurrence()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(sg.loss(model, TOKENS, chunk=7)).backward()
    scaler.unscale_(optimizer)
    got = collect(model, None, None)
    sg.backward(model, TOKENS, chunk=7)
    error, name = worst_error(got, collect(model, None, None))
    assert error == 0.0, f"{name} is off by {error:.1e}"  # a power of two rounds nothing


def test_autograd_grad_of_a_chunked_loss() -> None:
    model = LinearAttention().double()
    expected = plain(model, TOKENS, None)[1]
    (got,) = torch.autograd.grad(sg.loss(model, TOKENS, chunk=7), [model.qkv.weight])
    require_same({"qkv.weight": got}, {"qkv.weight": expected["qkv.weight"]})
    assert model.qkv.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", [GatedRecurrence, CachedAttention, AllKinds, LinearAttention])
def test_autocast(way: str, model_type: type[nn.Module]) -> None:
    """Chunked under autocast is as far from float64 as plain under autocast; `.backward()` is called outside."""
    model = model_type()
    exact = model_type().double()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    truth = parameters_only(plain(exact, TOKENS, None)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = model(TOKENS, model.initial_state(2))
        assert outputs.dtype == torch.bfloat16
        loss = F.cross_entropy(outputs.float().flatten(0, 1), explicit(TOKENS, None).flatten())
    loss.backward()
    baseline = distance(collect(model, None, None), truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if way == "backward":
            sg.backward(model, TOKENS, chunk=7)
        else:
            loss = sg.loss(model, TOKENS, chunk=7)
    if way == "loss":
        loss.backward()
    assert loss.dtype == torch.float32
    # measured, chunked over plain: 0.82 to 0.99 (plain is off by 2e-3 to 2e-2); at most twice, then
    assert 1e-5 < distance(collect(model, None, None), truth) <= 2 * baseline


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    off = sum(float((got[name].double() - g).norm()) ** 2 for name, g in expected.items())
    return (off / sum(float(g.norm()) ** 2 for g in expected.values())) ** 0.5


def test_autocast_is_that_of_the_forward_sweep() -> None:
    """A loss made outside autocast, its backward called inside: the chunks run again as they ran."""
    model = GatedRecurrence()
    sg.loss(model, TOKENS, chunk=7).backward()
    expected = collect(model, None, None)
    loss = sg.loss(model, TOKENS, chunk=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    for name, g in collect(model, None, None).items():
        assert torch.equal(g, expected[name])


def test_a_call_works_under_no_grad_and_in_eval_mode() -> None:
    model = GatedRecurrence().eval()
    with torch.no_grad():
        sg.backward(model, TOKENS, chunk=7)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16], ids=str)
def test_tokens_of_any_integer_type(dtype: torch.dtype) -> None:
    class Widening(GatedRecurrence):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            return super().forward(inputs.long(), state)

    model = Widening().double()
    expected = sg.backward(model, TOKENS, chunk=7).loss
    result = sg.backward(model, TOKENS.to(dtype), chunk=7)
    assert float(result.loss) == float(expected)
    assert result.num_targets == 78


def test_the_schedule_is_chosen_and_the_choice_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GatedRecurrence()
    with caplog.at_level(logging.INFO, logger="slimgrad"):
        result = sg.backward(model, TOKENS, chunk=4)
        assert result.schedule == sg.Rebuild()
        assert caplog.messages == [
            # nine copies of h [2, 6] in float32 and of one int64
            f"schedule: Rebuild(): sums are rolled back; {9 * (48 + 8)} bytes keep the plain tensors of every chunk"
        ]
        caplog.clear()
        assert sg.backward(LinearAttention(), TOKENS, chunk=4).schedule == sg.Rebuild()
        assert caplog.messages == ["schedule: Rebuild(): sums are rolled back; nothing is kept"]
        caplog.clear()
        monkeypatch.setattr(default, "KEPT_STATES_LIMIT_BYTES", 170)
        assert sg.backward(model, TOKENS, chunk=4).schedule == sg.Binomial(3)
        again = sg.Binomial(3).num_advances(10) - 9
        assert caplog.messages == [
            "schedule: Binomial(3): keeping the plain tensors of 10 chunks would take 504 bytes, over 170; "
            f"{again} chunks are advanced again instead"
        ]
        caplog.clear()
        sg.backward(model, TOKENS, chunk=4, schedule=sg.Keep())
        assert caplog.messages == []


def test_a_schedule_is_the_callers() -> None:
    for schedule in (sg.Keep(), sg.Every(2), sg.Binomial(2), sg.Rebuild()):
        assert sg.backward(GatedRecurrence(), TOKENS, chunk=4, schedule=schedule).schedule is schedule


def test_the_result_says_what_was_counted() -> None:
    model, targets = GatedRecurrence(), explicit(TOKENS, None)
    targets[0, :10] = -100
    result = sg.backward(model, TOKENS, targets, chunk=7)
    assert result.num_targets == 68
    assert result.loss.shape == ()
    assert result.loss.grad_fn is None
    assert int(result.final_state["position"]) == 40
    assert result.initial_state_grad["position"] is None
    assert result.initial_state_grad["h"].shape == (2, 6)
    assert result.input_grads is None


def test_chunked_is_a_module() -> None:
    model = GatedRecurrence()
    chunked = sg.Chunked(model, chunk=7, schedule=sg.Keep())
    assert "chunk=7, schedule=Keep(store='device', rows='device', tape=0)" in repr(chunked)
    assert {name for name, _ in chunked.named_parameters()} == {f"model.{n}" for n, _ in model.named_parameters()}
    loss = chunked(TOKENS)
    assert float(loss.detach()) == float(sg.evaluate(model, TOKENS, chunk=7).loss)
    halved = chunked(TOKENS, normalizer=156)
    assert float(halved.detach()) == pytest.approx(float(loss.detach()) / 2, rel=1e-6)
