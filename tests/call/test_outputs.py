"""`sg.outputs` against plain backpropagation: every model, every schedule, losses and trees of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from tests.contract.cases import BATCH, CASES, LENGTH, Built
from tests.contract.contract import between, check_draws, collect, fresh, fresh_state, raw, worst_error
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention, Signals

# Measured over all tests that import this: at most 2.1e-15 for any one gradient, relative to its own norm.
TOLERANCE = 1e-12
SCHEDULES = [sg.Rebuild(), sg.Keep(), sg.Every(3), sg.Binomial(2)]
TOKENS = torch.arange(2 * 41).reshape(2, 41) * 7 % 13

every_model = pytest.mark.parametrize("build", [build for _, build in CASES], ids=[name for name, _ in CASES])
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def plain(model: nn.Module, inputs: Any, *, state: Any = None, context: Any = None) -> Any:
    """The outputs of one call over the whole sequence, with their graph."""
    batch = pytree.tree_leaves(inputs)[0].shape[0]
    state = model.initial_state(batch) if state is None else state
    return (model(inputs, state) if context is None else model(inputs, state, context))[0]


def projected(outputs: Any) -> Tensor:
    """A loss that looks at every element, and not linearly."""
    generator = torch.Generator().manual_seed(4)
    total = torch.zeros((), dtype=torch.float64)
    for x in pytree.tree_leaves(outputs):
        weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        total = total + (torch.tanh(x / 4).double() * weights).mean()
    return total


def gradients(model: nn.Module, loss: Tensor, inputs: Any = None, state: Any = None) -> dict[str, Tensor]:
    """After a backward pass: of parameters, inputs and the initial state that was given."""
    loss.backward()
    leaves = [raw(leaf) for leaf in pytree.tree_leaves(state)]
    return collect(model, inputs, [None if x is None else x.grad for x in leaves])


def require_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    error, name = worst_error(got, expected)
    assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
    assert sum(float(g.abs().sum()) for g in expected.values()) > 0  # a truth of zeros would agree with anything


@every_model
@every_schedule
@pytest.mark.parametrize("chunk", [1, 26, LENGTH - 1])  # 131 tokens: both of the latter leave one over
def test_every_model_under_every_schedule(build: Callable[[], Built], schedule: sg.Schedule, chunk: int) -> None:
    """From the state that the model makes: parameters and inputs."""
    model, inputs, _ = build()
    mine, theirs = fresh(inputs), fresh(inputs)
    outputs = sg.outputs(model, mine, chunk=chunk, schedule=schedule)
    whole = plain(model, theirs)
    torch.testing.assert_close(outputs, whole, rtol=1e-11, atol=1e-13)  # measured: 3e-13 near zero
    got = gradients(model, projected(outputs), mine)
    require_equal(got, gradients(model, projected(whole), theirs))


@every_model
def test_from_a_given_state(build: Callable[[], Built]) -> None:
    model, inputs, _ = build()
    with torch.no_grad():
        _, state = model(between(inputs, 0, 17), model.initial_state(BATCH))
    mine, theirs = fresh_state(state), fresh_state(state)
    outputs = sg.outputs(model, inputs, chunk=16, state=mine)
    got = gradients(model, projected(outputs), None, mine)
    expected = gradients(model, projected(plain(model, inputs, state=theirs)), None, theirs)
    require_equal(got, expected)
    assert any(name.startswith("state") for name in expected)


@every_model
@every_schedule
def test_a_list_of_documents(build: Callable[[], Built], schedule: sg.Schedule) -> None:
    model, inputs, _ = build()
    documents = [between(inputs, *span) for span in ((0, 33), (33, 50), (50, 51), (51, LENGTH))]
    mine, theirs = ([fresh(document) for document in documents] for _ in range(2))
    outputs = sg.outputs(model, mine, chunk=16, schedule=schedule)
    assert isinstance(outputs, list)
    assert [x.shape[1] for x in outputs] == [33, 17, 1, LENGTH - 51]
    got = gradients(model, projected(outputs), mine)
    expected = gradients(model, projected([plain(model, document) for document in theirs]), theirs)
    require_equal(got, expected)


def last_step(outputs: Tensor) -> Tensor:
    return outputs[:, -1].logsumexp(-1).sum()


def a_few_steps(outputs: Tensor) -> Tensor:
    return outputs[:, [3, 17, 17, 40]].square().sum()


def means_of_documents(outputs: Tensor) -> Tensor:
    return sum(part.mean().square() for part in outputs.split([5, 20, 16], 1))


def masked_regression(outputs: Tensor) -> Tensor:
    mask = (TOKENS % 3 == 0)[..., None]
    return ((outputs - 1.5).square() * mask).sum() / mask.sum()


def across_time(outputs: Tensor) -> Tensor:
    return (outputs @ outputs.transpose(1, 2)).tanh().mean()


def written_to(outputs: Tensor) -> Tensor:
    """The caller's own tensor, to be written to like any."""
    outputs /= 2.0
    outputs[:, :7] = 0
    return outputs.square().sum()


@pytest.mark.parametrize(
    "loss", [last_step, a_few_steps, means_of_documents, masked_regression, across_time, written_to]
)
@pytest.mark.parametrize("model_type", [GatedRecurrence, CachedAttention, LinearAttention, AllKinds])
def test_losses_of_other_forms(model_type: Callable[[], nn.Module], loss: Callable[[Tensor], Tensor]) -> None:
    model = model_type().double()
    got = gradients(model, loss(sg.outputs(model, TOKENS, chunk=7)))
    require_equal(got, gradients(model, loss(plain(model, TOKENS))))


def test_a_preference_between_two_sequences() -> None:
    """Four graphs of one model in one loss, two of them made without gradients."""
    model, reference = AllKinds().double(), AllKinds().double()
    chosen, rejected = TOKENS, (TOKENS * 5 + 1) % 13

    def log_probability(of: Callable, a_model: nn.Module, tokens: Tensor) -> Tensor:
        return of(a_model, tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum((1, 2))

    def loss(of: Callable) -> Tensor:
        with torch.no_grad():
            before = log_probability(of, reference, chosen) - log_probability(of, reference, rejected)
        margin = log_probability(of, model, chosen) - log_probability(of, model, rejected) - before
        return -F.logsigmoid(0.1 * margin).mean()

    got = gradients(model, loss(lambda m, tokens: sg.outputs(m, tokens, chunk=7)))
    require_equal(got, gradients(model, loss(plain)))
    assert all(p.grad is None for p in reference.parameters())


def test_two_graphs_of_one_model_alive() -> None:
    """Called twice before the first backward: each goes back over its own states, in whatever order."""
    model = AllKinds().double()
    other = (TOKENS + 3) % 13
    expected = [gradients(model, projected(plain(model, tokens))) for tokens in (TOKENS, other)]
    for order in ((0, 1), (1, 0)):
        outputs = [sg.outputs(model, tokens, chunk=7) for tokens in (TOKENS, other)]
        for i in order:
            require_equal(gradients(model, projected(outputs[i])), expected[i])


def test_beside_a_plain_call_in_one_loss() -> None:
    model = AllKinds().double()
    twice = {name: 2 * g for name, g in gradients(model, projected(plain(model, TOKENS))).items()}
    loss = projected(sg.outputs(model, TOKENS, chunk=7)) + projected(plain(model, TOKENS))
    require_equal(gradients(model, loss), twice)


class Encoded(nn.Module):
    """Float inputs read twice, and a context that the head looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Signals()

    def initial_state(self, batch_size: int) -> Any:
        return self.core.initial_state(batch_size)

    def forward(self, inputs: dict[str, Tensor], state: Any, context: dict[str, Tensor]) -> tuple[Tensor, Any]:
        outputs, state = self.core(inputs, state)
        return outputs * context["gain"][:, None] + inputs["left"].sum(-1, keepdim=True), state


def test_inputs_and_context_made_by_another_module() -> None:
    """Not leaves: the gradient goes on into the encoder that made them."""
    encoder, model = nn.Linear(3, 11).double(), Encoded().double()
    signal, image = torch.randn(2, 23, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def arguments() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        left, right, gain = encoder(signal).split([3, 3, 5], -1)
        return {"left": left, "right": right}, {"gain": encoder(image)[:, 6:] + gain.mean(1)}

    def found(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        inputs, context = arguments()
        every = nn.ModuleDict({"encoder": encoder, "model": model})
        return gradients(every, projected(call(model, inputs, context=context)))

    got = found(lambda *args, **options: sg.outputs(*args, chunk=4, **options))
    require_equal(got, found(plain))


def test_outputs_that_are_the_inputs_or_the_state() -> None:
    """Leaves of the chunk's own, returned as they are; and one tensor in two places."""

    class Untouched(nn.Module):
        def initial_state(self, batch_size: int) -> Tensor:
            return torch.ones(batch_size, 1, 2, dtype=torch.float64)

        def forward(self, inputs: Tensor, state: Tensor) -> tuple[Any, Tensor]:
            both = state.expand(-1, inputs.shape[1], -1)
            return {"inputs": inputs, "again": inputs, "state": both, "halves": both / 2}, state

    start = torch.rand(2, 1, 2, dtype=torch.float64)
    signal = torch.randn(2, 9, 2, dtype=torch.float64)
    mine, theirs = fresh(signal), fresh(signal)
    mine_first, theirs_first = fresh(start), fresh(start)
    model = Untouched()
    got = gradients(model, projected(sg.outputs(model, mine, chunk=4, state=mine_first)), mine, mine_first)
    require_equal(got, gradients(model, projected(plain(model, theirs, state=theirs_first)), theirs, theirs_first))


@every_schedule
def test_with_dropout(schedule: sg.Schedule) -> None:
    check_draws(AllKinds().double(), TOKENS, chunk=9, schedule=schedule, way="outputs")


def test_the_mode_of_the_call_is_that_of_both_sweeps() -> None:
    """Dropout as it was when the outputs were computed, though the model is in evaluation mode by then."""
    model, found = AllKinds(dropout=0.4).double(), []
    for changes in (False, True):
        torch.manual_seed(11)
        loss = projected(sg.outputs(model.train(), TOKENS, chunk=9))
        if changes:
            model.eval()
        found.append(gradients(model, loss))
        assert model.training is not changes
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())
    assert not torch.equal(found[0]["conv.bias"], gradients(model, projected(plain(model, TOKENS)))["conv.bias"])


def test_a_compiled_model() -> None:
    model = AllKinds().double()
    expected = gradients(model, projected(plain(model, TOKENS)))
    model.compile(backend="eager")
    require_equal(gradients(model, projected(sg.outputs(model, TOKENS, chunk=8))), expected)


@every_model
def test_no_gradients_wanted(build: Callable[[], Built]) -> None:
    """A plain pass in chunks, whose values are those of one with a graph."""
    model, inputs, _ = build()
    with_graph = sg.outputs(model, inputs, chunk=26)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            outputs = sg.outputs(model, inputs, chunk=26)
        assert not outputs.requires_grad
        torch.testing.assert_close(outputs, with_graph.detach(), rtol=1e-12, atol=1e-14)
    model.requires_grad_(False)
    assert not sg.outputs(model, inputs, chunk=26).requires_grad
