"""Documents of a list go through together where nothing can tell, and alone where anything could."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call import together
from slimgrad.call.arguments import Options
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.models import Performer, PerformerConfig
from tests.toy_models import MODELS, GatedRecurrence

LANGUAGE_MODELS = [model for name, model in MODELS.items() if name != "signals"]
LENGTHS = (12, 3, 11, 12, 1, 10, 2, 40, 11)
CHUNK = 36


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 13, (length,), generator=generator) for length in lengths]


def gradients(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(found, expected, strict=True))


class Calls:
    """How often a model's forward runs."""

    def __init__(self, model: nn.Module) -> None:
        self.number = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1


def plain(model: Any, texts: list[Tensor], targets: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by plain backpropagation, document by document."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index, text in enumerate(texts):
        goal = F.pad(text[1:].long(), (0, 1), value=-100) if targets is None else targets[index].long()
        outputs, _ = model(text[None], model.initial_state(1))
        total = total + F.cross_entropy(outputs[0], goal, reduction="sum", ignore_index=-100)
        count += int((goal != -100).sum())
    (total / count).backward()
    return (total / count).detach(), gradients(model)


def options(chunk: int) -> Options:
    return Options(None, chunk, None, cross_entropy_sum, "targets", None, None)


def backward(model: nn.Module, *given: Any, **options: Any) -> Tensor:
    return sg.backward(model, *given, **options).loss


def loss(model: nn.Module, *given: Any, **options: Any) -> Tensor:
    found = sg.loss(model, *given, **options)
    found.backward()
    return found.detach()


def chunked(model: nn.Module, *given: Any, chunk: int, **_: Any) -> Tensor:
    found = sg.Chunked(model, chunk=chunk)(*given)
    found.backward()
    return found.detach()


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
@pytest.mark.parametrize("way", [backward, loss, chunked])
@pytest.mark.parametrize("aims", [False, True], ids=["next", "targets"])
def test_the_gradient_is_that_of_each_document_alone(
    model_type: type[nn.Module], way: Callable[..., Tensor], aims: bool
) -> None:
    model, texts = model_type().double(), documents()
    targets = [torch.where(text % 3 == 0, -100, (text * 5) % 13) for text in texts] if aims else None
    given = (texts,) if targets is None else (texts, targets)
    expected = plain(model, texts, targets)
    calls = Calls(model)
    found = way(model, *given, chunk=CHUNK)
    torch.testing.assert_close(found.double(), expected[0], rtol=1e-12, atol=0)
    assert off(gradients(model), expected[1]) < 1e-12  # measured at most 8e-16
    calls.number, found = 0, calls.number
    way(model, *given, chunk=CHUNK, **({"on_chunk": lambda event: None} if way is not chunked else {}))
    gradients(model)
    if way is not chunked:  # where somebody listens each goes alone
        assert found < calls.number
    assert found <= 2 * (5 + 2) + 2  # 5 batches of a chunk, 40 tokens in two chunks; and two to see if it may be so


def test_losses_and_counts_are_the_same_and_tokens_of_any_dtype_will_do() -> None:
    model, texts = GatedRecurrence().double(), documents()
    apart = sg.evaluate(model, texts, chunk=CHUNK, final_states=True)
    for dtype in (torch.int64, torch.int32):
        calls = Calls(model)
        found = sg.evaluate(model, [text.to(dtype)[None] for text in texts], chunk=CHUNK)
        assert found.num_targets == apart.num_targets
        torch.testing.assert_close(found.loss, apart.loss, rtol=1e-13, atol=0)
        assert calls.number == 5 + 2 + 2  # batches, two chunks of the long one, and two to see if it may be so
        sg.evaluate(model, texts, chunk=CHUNK, final_states=True)
        assert calls.number == 5 + 2 + 2 + len(texts) + 1


def test_states_are_kept_on_request_alone() -> None:
    model, texts = GatedRecurrence().double(), documents()
    result = sg.backward(model, texts, chunk=CHUNK)
    for name in ("final_state", "initial_state_grad"):
        with pytest.raises(sg.InputError, match=f"{name}: documents of a list go through together.*final_states=True"):
            getattr(result, name)
    assert result.input_grads == [None] * len(texts)
    assert "num_targets" in repr(result)
    first = gradients(model)
    kept = sg.backward(model, texts, chunk=CHUNK, final_states=True)
    assert off(gradients(model), first) < 1e-12
    assert len(kept.final_state) == len(kept.initial_state_grad) == len(texts)
    again = sg.backward(model, texts, chunk=CHUNK, state=kept.final_state)  # with states each goes alone
    assert len(again.final_state) == len(texts)


class Mixing(GatedRecurrence):
    """Rows of a batch look at one another."""

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, following = super().forward(tokens, state)
        return outputs + 0.1 * outputs.mean(0, keepdim=True), following


class Drawing(GatedRecurrence):
    """Dropout that no module tells of."""

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, following = super().forward(tokens, state)
        return F.dropout(outputs, 0.2, self.training), following


class Dropping(GatedRecurrence):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, following = super().forward(tokens, state)
        return self.drop(outputs), following


@pytest.mark.parametrize("kind", [Mixing, Drawing, Dropping])
def test_where_rows_are_not_independent_documents_go_alone(kind: type[GatedRecurrence]) -> None:
    model, texts = kind().double(), documents()
    torch.manual_seed(5)
    first = sg.backward(model, texts, chunk=CHUNK)
    found = gradients(model)
    torch.manual_seed(5)
    apart = sg.backward(model, texts, chunk=CHUNK, final_states=True)
    assert torch.equal(first.loss, apart.loss)  # the same draws too
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model), strict=True))
    assert len(first.final_state) == len(texts)
    if kind is Mixing:
        assert off(found, plain(model, texts)[1]) < 1e-12
        return
    model.eval()
    with pytest.raises(sg.InputError, match="go through together"):
        _ = sg.backward(model, texts, chunk=CHUNK).final_state


def test_random_features_are_drawn_for_each_document() -> None:
    model = Performer(PerformerConfig(layers=1, width=16, heads=2, feature_map="favor"))
    texts = documents()
    assert len(sg.backward(model, texts, chunk=CHUNK).final_state) == len(texts)


class OneRow(GatedRecurrence):
    """A model that takes no batches."""

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        assert len(tokens) == 1
        return super().forward(tokens, state)


def test_a_model_of_one_row_takes_documents_one_by_one() -> None:
    texts = documents()
    assert len(sg.backward(OneRow().double(), texts, chunk=CHUNK).final_state) == len(texts)


def test_long_documents_are_neither_copied_nor_put_in_another_order() -> None:
    model, texts = GatedRecurrence().double(), documents((80, 90, 70))
    assert together.join(model, texts, None, options(chunk=CHUNK)).inputs is texts
    texts = documents((80, 8, 8))
    joined = together.join(model, texts, None, options(chunk=CHUNK))
    assert joined.documents == 3
    assert joined.inputs[0] is texts[0]
    assert joined.targets[0] is None


@pytest.mark.parametrize(
    "options",
    [
        {"loss_fn": lambda outputs, targets: outputs.square().sum()},
        {"on_chunk": lambda event: None},
        {"final_states": True},
        {"memory": "16GiB"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_could_tell_keeps_them_apart(options: dict[str, Any]) -> None:
    model, texts = GatedRecurrence().double(), documents((8, 8, 8))
    result = sg.backward(model, texts, **options)
    assert [state["h"].shape[0] for state in result.final_state] == [1, 1, 1]


def test_what_is_drawn_elsewhere_does_not_change() -> None:
    model, texts = GatedRecurrence().double(), documents()
    drawn: list[Tensor] = []
    for final_states in (False, True):
        torch.manual_seed(7)
        sg.backward(model, texts, chunk=CHUNK, final_states=final_states)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_an_empty_document_and_bad_targets_are_refused_as_ever() -> None:
    model = GatedRecurrence().double()
    with pytest.raises(sg.InputError, match=r"sequence 1 of the list: .*Leave empty documents out"):
        sg.backward(model, [torch.tensor([1, 2]), torch.empty(0, dtype=torch.int64), torch.tensor([3, 4])], chunk=4)
    with pytest.raises(sg.InputError, match="expected a list of 2, got a list of 1"):
        sg.backward(model, documents((5, 5)), documents((5,)), chunk=8)


def test_padding_that_counted_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a batch whose padding has targets."""
    model, texts = GatedRecurrence().double(), documents()
    expected = plain(model, texts)
    as_padded = together._padded  # pyright: ignore[reportPrivateUsage]

    def padded(rows: Any) -> tuple[Tensor, Tensor]:
        tokens, aims = as_padded(rows)
        for number, row in enumerate(rows):
            aims[number, len(row.tokens) :] = 1
        return tokens, aims

    monkeypatch.setattr(together, "_padded", padded)
    monkeypatch.setattr(together, "_are_independent", lambda *_: True)
    sg.backward(model, texts, chunk=CHUNK)
    assert off(gradients(model), expected[1]) > 1e-3


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 100))
def test_every_document_is_in_one_batch_that_fits(lengths: list[int], chunk: int) -> None:
    groups = together._groups(lengths, chunk)  # pyright: ignore[reportPrivateUsage]
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[number] for number in group)
        assert len(group) == 1 or len(group) * longest <= chunk
        assert len(group) * longest * 0.8 <= sum(lengths[number] for number in group)
