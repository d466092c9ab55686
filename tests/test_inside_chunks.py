"""What models do inside a chunk: dropout, activation checkpointing, drawn initial states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slimgrad as sg
from tests.contract.contract import collect, explicit, plain, spans, worst_error
from tests.toy_models import AllKinds, GatedRecurrence

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 13
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)]


class Checkpointed(nn.Module):
    """Two layers, one over a sum and one over a cache, each recomputed in the backward pass if asked."""

    def __init__(self, *, sums: bool, cache: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.summed, self.attention, self.head = nn.Linear(6, 6), nn.Linear(6, 18), nn.Linear(6, 13)
        self.dropout = nn.Dropout(dropout)
        self.sums, self.cache = sums, cache

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        zeros = self.head.weight.new_zeros
        return {"sum": sg.PrefixSum(zeros(batch_size, 6)), "cache": sg.Growing(zeros(batch_size, 0, 12))}

    def over_the_sum(self, x: Tensor, state: sg.PrefixSum) -> tuple[Tensor, sg.PrefixSum]:
        y = self.dropout(torch.tanh(self.summed(x)))
        before, following = state.advance(y.sum(1))
        return x + torch.tanh(before[:, None] + y.cumsum(1)), following

    def over_the_cache(self, x: Tensor, state: sg.Growing) -> tuple[Tensor, sg.Growing]:
        start = state.length
        q, kv = self.dropout(self.attention(x)).split([6, 12], -1)
        rows, following = state.append(kv)
        keys, values = rows.chunk(2, -1)
        seen = torch.arange(rows.shape[1])[None] <= torch.arange(start, start + x.shape[1])[:, None]
        scores = (q @ keys.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        return x + scores.softmax(-1) @ values, following

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        def layer(run: Any, again: bool, *args: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False) if again else run(*args)

        x, sums = layer(self.over_the_sum, self.sums, self.embed(inputs), state["sum"])
        x, cache = layer(self.over_the_cache, self.cache, x, state["cache"])
        return self.head(x), {"sum": sums, "cache": cache}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("sums", "cache"), [(True, False), (False, True), (True, True)])
def test_activation_checkpointing_inside_a_chunk(sums: bool, cache: bool, schedule: sg.Schedule) -> None:
    model = Checkpointed(sums=sums, cache=cache).double()
    expected = plain(model, TOKENS, None)[1]
    result = sg.backward(model, TOKENS, chunk=7, schedule=schedule)
    error, name = worst_error(collect(model, None, result.initial_state_grad), expected)
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 5e-16


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(2)], ids=str)
@pytest.mark.parametrize(("sums", "cache"), [(True, False), (False, True), (True, True)])
def test_dropout_inside_activation_checkpointing(sums: bool, cache: bool, schedule: sg.Schedule) -> None:
    """The same draws with and without checkpointing, so the same gradient; and both are those of one graph."""
    found = []
    for again in (False, True):
        torch.manual_seed(4)
        model = Checkpointed(sums=sums and again, cache=cache and again, dropout=0.3).double()
        loss = sg.loss(model, TOKENS, chunk=7, schedule=schedule)
        loss.backward()
        found.append(collect(model, None, None))
    error, name = worst_error(found[1], found[0])
    assert error <= 1e-14, f"{name} is off by {error:.1e}"  # measured 0: the same operations
    assert sg.verify(model.train(), TOKENS, chunk=7, schedule=schedule).passed


def test_reentrant_checkpointing_is_refused() -> None:
    class Reentrant(Checkpointed):
        def forward(self, inputs: Tensor, state: dict[str, Any]) -> Any:
            x = self.embed(inputs)
            box = []

            def run(x: Tensor) -> Tensor:
                y, following = self.over_the_sum(x, state["sum"])
                box.append(following)
                return y

            x = checkpoint(run, x, use_reentrant=True)
            return self.head(x), {"sum": box[0], "cache": state["cache"]}

    model = Reentrant(sums=False, cache=False)
    with pytest.raises(
        sg.ModelError, match=r"advance was called without gradients in the reverse sweep.*use_reentrant"
    ):
        sg.backward(model, TOKENS, chunk=7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("model_type", [GatedRecurrence, AllKinds])
def test_dropout_in_training_mode(model_type: type[nn.Module], schedule: sg.Schedule) -> None:
    report = sg.verify(model_type(dropout=0.4).train(), TOKENS, chunk=7, schedule=schedule)
    assert report.passed, report


def test_dropout_draws_anew_in_each_chunk() -> None:
    model = GatedRecurrence(dropout=0.5).train()
    kept: list[Tensor] = []
    model.dropout.register_forward_hook(lambda module, args, output: kept.append(output != 0))
    sg.evaluate(model, torch.zeros(2, 40, dtype=torch.int64), chunk=8)
    assert len({tuple(mask.flatten().tolist()) for mask in kept}) == 5


class Redrawn(GatedRecurrence):
    """Draws features when the state begins, as random-feature attention does; they stay for the sequence."""

    def initial_state(self, batch_size: int) -> Any:
        return super().initial_state(batch_size) | {"features": torch.randn(6, 6).to(self.start.dtype)}

    def forward(self, inputs: Tensor, state: Any) -> Any:
        outputs, following = super().forward(inputs, {"h": state["h"], "position": state["position"]})
        mixed = torch.tanh(following["h"] @ state["features"])
        return outputs + mixed.sum(), following | {"features": state["features"]}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_features_drawn_in_the_initial_state(schedule: sg.Schedule) -> None:
    model = Redrawn().double()
    report = sg.verify(model, TOKENS, chunk=40, schedule=schedule)  # whole: mixing depends on where chunks are cut
    assert max(finding.error for finding in report.findings) <= 1e-12, report
    first = sg.backward(model, TOKENS, chunk=7, schedule=schedule).final_state["features"]
    second = sg.backward(model, TOKENS, chunk=7, schedule=schedule).final_state["features"]
    assert not torch.equal(first, second)  # redrawn between calls


class Partial(nn.Module):
    """Leaves parts of its state alone: a sum untouched in odd chunks, a constant, a state that no loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)
        self.bias = nn.Parameter(torch.randn(6))

    def initial_state(self, batch_size: int) -> dict[str, Any]:
        zeros = self.bias.new_zeros(batch_size, 6)
        return {
            "sum": sg.PrefixSum(zeros + self.bias),
            "rows": sg.Growing(zeros[:, None]),
            "constant": torch.sin(self.bias),
            "unseen": zeros,
            "chunk": torch.zeros((), dtype=torch.int64),
        }

    def forward(self, inputs: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        x = torch.tanh(self.embed(inputs))
        following = state | {"unseen": state["unseen"] + x.sum(1), "chunk": state["chunk"] + 1}
        if int(state["chunk"]) % 2 == 0:
            before, following["sum"] = state["sum"].advance(x.sum(1))
            rows, following["rows"] = state["rows"].append(x[:, :1])
            x = x + before[:, None] + rows.sum(1, keepdim=True)
        return self.head(x * state["constant"]), following


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("chunk", [5, 8, 13])
def test_parts_of_a_state_left_untouched(schedule: sg.Schedule, chunk: int) -> None:
    model = Partial().double()
    state = model.initial_state(2)
    leaves = [state["sum"].value, state["rows"].value, state["constant"], state["unseen"]]
    for leaf in leaves:
        (leaf.retain_grad if leaf.requires_grad else leaf.requires_grad_)()
    targets, total, now = explicit(TOKENS, None), 0.0, state
    for start, stop in spans(40, chunk):
        outputs, now = model(TOKENS[:, start:stop], now)
        total = total + F.cross_entropy(
            outputs.flatten(0, 1), targets[:, start:stop].flatten(), reduction="sum", ignore_index=-100
        )
    (total / 78).backward()
    expected = collect(model, None, [leaf.grad for leaf in leaves])
    result = sg.backward(model, TOKENS, chunk=chunk, schedule=schedule)
    gradient = result.initial_state_grad
    found = collect(model, None, [gradient[name] for name in ("sum", "rows", "constant", "unseen")])
    error, name = worst_error(found, expected)
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
    assert gradient["unseen"] is None or not gradient["unseen"].any()
    torch.testing.assert_close(result.final_state["sum"].value, now["sum"].value.detach(), rtol=1e-14, atol=1e-14)


def test_a_detached_state_cuts_the_gradient_where_the_model_says_so() -> None:
    """Truncation is the model's to choose: what it detaches is cut in both, at the same place."""

    class Cut(GatedRecurrence):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            return super().forward(inputs, state | {"h": state["h"].detach()})

    model = Cut().double()
    whole = sg.verify(model, TOKENS, chunk=40)
    assert not whole.was_cut
    assert max(finding.error for finding in whole.findings) <= 1e-12
    result = sg.backward(model, TOKENS, chunk=7)
    assert result.initial_state_grad["h"] is None
    assert model.start.grad is None


def test_a_window_that_grows_and_then_slides() -> None:
    """A plain tensor whose shape changes along time."""

    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)

        def initial_state(self, batch_size: int) -> Tensor:
            return self.head.weight.new_zeros(batch_size, 0, 6)

        def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.cat([state, torch.tanh(self.embed(inputs))], 1)
            padded = F.pad(rows, (0, 0, 10, 0))
            sums = padded.unfold(1, 11, 1).mean(-1)[:, -inputs.shape[1] :]
            return self.head(sums), rows[:, -10:]

    model = Window().double()
    for schedule in (*SCHEDULES, sg.Keep(store="disk")):
        for chunk in (3, 7, 25):
            expected = plain(model, TOKENS, None)[1]
            result = sg.backward(model, TOKENS, chunk=chunk, schedule=schedule)
            error, name = worst_error(collect(model, None, result.initial_state_grad), expected)
            assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
