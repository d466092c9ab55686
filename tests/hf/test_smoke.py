"""The check on a model's own weights: passes what is right in each dtype, and sees what was put on one model alone."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.errors import ModelError  # noqa: E402
from slimgrad.hf.forwards import enabled  # noqa: E402
from tests.hf.models import KINDS, large, llama, tokens  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_right_models_pass(kind: str, dtype: torch.dtype) -> None:
    slimgrad.hf.enable(large(KINDS[kind]()).to(dtype), check=True)


class LooksAcross(nn.Module):
    """A layer that subtracts what it sees of a chunk at once: causal in no way, and none of the class' own."""

    def __init__(self, inside: nn.Module, share: float) -> None:
        super().__init__()
        self.inside, self.share = inside, share

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) - self.share * x.mean(1, keepdim=True)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3), (torch.float16, 0.1)])
def test_a_planted_fault_is_seen(dtype: torch.dtype, share: float) -> None:
    model = large(llama()).to(dtype)
    slimgrad.hf.disable(slimgrad.hf.enable(model))
    model.model.layers[0].mlp = LooksAcross(model.model.layers[0].mlp, share)
    with pytest.raises(ModelError) as raised:
        slimgrad.hf.enable(model)
    said = re.search(r"in one pass by (\S+), where (\S+) is expected of rounding", str(raised.value))
    assert said is not None, raised.value
    found, allowed = (float(x) for x in said.groups())
    print(dtype, found, allowed)
    assert found > allowed > 0
    assert not enabled(model)
    assert "forward" not in model.__dict__
    slimgrad.hf.enable(model, check=False)


def test_nothing_else_is_touched() -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=40)
    model = transformers.GPT2LMHeadModel(config).train()  # dropout, and fewer positions than the check's tokens
    model.transformer.h[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modes = [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    slimgrad.hf.enable(model, chunk=13)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in model.modules()] == modes
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {"transformer.wte.weight"}
    assert bool((grads["transformer.wte.weight"] == 1).all())
    assert torch.is_grad_enabled()


def test_frequencies_that_depend_on_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = large(llama(max_position_embeddings=16, rope_parameters=rope)).float()
    slimgrad.hf.enable(model, chunk=13)
    model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_weights_that_are_not_there() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ModelError, match=r"weights are not all here.*check=False"):
        slimgrad.hf.enable(model)
    slimgrad.hf.enable(model, check=False)
