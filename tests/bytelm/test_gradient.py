"""Three ways to one gradient, in float64, for every kind of batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slimgrad.bytelm.gradient import add_gradient, layers_computed_twice
from slimgrad.data import Batch, Windows, copying_batches, whole
from slimgrad.models import Performer
from tests.bytelm.settings import TEXT, TINY_MODEL, documents

BATCHES = {
    "one window": Batch(TEXT[None, :101]),
    "several windows": Batch(TEXT[:300].view(3, 100)),
    "documents": Batch([TEXT[None, :67], TEXT[None, 100:113], TEXT[None, 200:202]]),
    "read as they are used": Batch(Windows(documents(67, 113, 200).text, [3, 100], 101)),
    "copying": next(copying_batches(64, 1, batch=3, seed=0)),
}
MODELS = {
    "rms norm": TINY_MODEL,
    "normalised": dataclasses.replace(TINY_MODEL, normalize=True),
    "random features": dataclasses.replace(TINY_MODEL, feature_map="favor", features=5, normalize=True),
}
# float64; measured over the models, the batches and both ways: at most 6.4e-16
TOLERANCE = 1e-14


def gradient(model: Performer, batch: Batch, method: str) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # random features are drawn anew for every sequence
    loss = add_gradient(model, batch, method=method, chunk=24, schedule=None, normalizer=batch.num_targets)  # type: ignore[arg-type]
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("method", ["chunked", "checkpoint"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_method_gives_the_gradient_of_plain_backpropagation(name: str, method: str, shape: str) -> None:
    model = Performer(MODELS[shape]).double()
    plain_loss, plain = gradient(model, BATCHES[name], "plain")
    loss, found = gradient(model, BATCHES[name], method)
    assert plain.norm() > 0
    assert loss == pytest.approx(plain_loss, rel=TOLERANCE)
    assert float((found - plain).norm() / plain.norm()) < TOLERANCE


def test_what_is_read_as_it_is_used_has_the_bits_of_what_is_in_memory() -> None:
    batch = BATCHES["read as they are used"]
    model = Performer(TINY_MODEL)
    loss, found = gradient(model, batch, "chunked")
    in_memory, expected = gradient(model, Batch(whole(batch.sequences[0])), "chunked")
    assert loss == in_memory
    assert torch.equal(found, expected)


def test_the_loss_is_the_mean_over_the_targets_that_count() -> None:
    batch = BATCHES["documents"]
    model = Performer(TINY_MODEL).double()
    loss, _ = gradient(model, batch, "plain")
    total = 0.0
    for document in batch.sequences:
        logits, _ = model(document, model.initial_state(1))
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], document[0, 1:].long(), reduction="none")
        total += float(losses.detach().sum())
    assert batch.num_targets == 66 + 12 + 1
    assert loss == pytest.approx(total / batch.num_targets, rel=1e-12)


def test_checkpointed_layers_are_themselves_again_even_after_an_error() -> None:
    model = Performer(TINY_MODEL)

    def fail() -> None:
        with layers_computed_twice(model):
            assert all("forward" in vars(layer) for layer in model.layers)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    model = Performer(TINY_MODEL)
    kept: dict[str, int] = {}
    for method in ("plain", "checkpoint"):
        seen: dict[int, int] = {}

        def keep(x: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            gradient(model, Batch(TEXT[None, :1000]), method)
        kept[method] = sum(seen.values())
    assert kept["checkpoint"] < kept["plain"]


@pytest.mark.parametrize("method", ["plain", "checkpoint", "chunked"])
def test_in_bf16_every_method_stays_near_float32(method: str) -> None:
    model = Performer(TINY_MODEL)
    exact_loss, exact = gradient(model, BATCHES["several windows"], method)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = gradient(model, BATCHES["several windows"], method)
    assert not torch.equal(found, exact)
    assert found.dtype == torch.float32
    assert loss == pytest.approx(exact_loss, rel=1e-4)  # measured: 1.5e-5
    assert float((found - exact).norm() / exact.norm()) < 0.02  # measured: 3.7e-3


def test_gradients_add_to_those_that_are_there() -> None:
    model = Performer(TINY_MODEL).double()
    batch = BATCHES["several windows"]
    for method in ("plain", "checkpoint", "chunked"):
        _, once = gradient(model, batch, method)
        add_gradient(model, batch, method=method, chunk=24, schedule=None, normalizer=batch.num_targets)  # type: ignore[arg-type]
        twice = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float((twice - 2 * once).norm() / once.norm()) < TOLERANCE
