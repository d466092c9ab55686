"""What an adapter cannot do exactly is refused by name, when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import slimgrad as sg
from slimgrad import adapters
from tests.adapters.cases import FEATURES, Block, Residual, require_exact


def layer(**attention: Any) -> nn.TransformerEncoderLayer:
    found = nn.TransformerEncoderLayer(FEATURES, 2, 11)
    found.self_attn = nn.MultiheadAttention(FEATURES, 2, **attention)
    return found


class Slower(nn.TransformerEncoderLayer):
    """Its feed-forward part is its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 0.5 * super()._ff_block(x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, outputs: 2 * outputs)
    return module


def hooked_before(found: nn.TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    found.self_attn.register_forward_pre_hook(lambda module, args: None)
    return found


class OtherBlock(Block):
    """A version that has the names, and another recurrence."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(u) + u


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "bidirectional": (
        lambda: sg.adapters.Recurrent(nn.LSTM(3, 4, bidirectional=True)),
        r"bidirectional=True is not causal: .* later inputs.* Expected bidirectional=False",
    ),
    "a cell": (lambda: sg.adapters.Recurrent(nn.LSTMCell(3, 4)), "expected torch.nn.LSTM, GRU or RNN, got LSTMCell"),
    "an encoder": (
        lambda: sg.adapters.TransformerLayer(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)),
        "expected torch.nn.TransformerEncoderLayer, got TransformerEncoder. Of an encoder wrap each of its layers",
    ),
    "add_bias_kv": (lambda: sg.adapters.TransformerLayer(layer(add_bias_kv=True)), "add_bias_kv=True in self_attn"),
    "add_zero_attn": (lambda: sg.adapters.TransformerLayer(layer(add_zero_attn=True)), "add_zero_attn=True in"),
    "kdim and vdim": (lambda: sg.adapters.TransformerLayer(layer(kdim=4, vdim=5)), "kdim=4, vdim=5 in self_attn"),
    "another attention": (
        lambda: sg.adapters.TransformerLayer(with_attention(nn.Identity())),
        "expected torch.nn.MultiheadAttention in self_attn, got Identity",
    ),
    "a subclass": (
        lambda: sg.adapters.TransformerLayer(Slower(FEATURES, 2, 11, batch_first=True)),
        "TransformerLayer: Slower has its own _ff_block, which the adapter does not call",
    ),
    "a hook": (
        lambda: sg.adapters.TransformerLayer(hooked(nn.TransformerEncoderLayer(FEATURES, 2, 11))),
        "TransformerLayer: TransformerEncoderLayer has hooks, and the adapter does not call it",
    ),
    "a weight that a hook makes anew": (
        lambda: sg.adapters.TransformerLayer(hooked_before(layer())),
        "TransformerLayer: MultiheadAttention has hooks.* torch.nn.utils.parametrizations",
    ),
    "a hook on a block": (
        lambda: sg.adapters.MambaPy(SimpleModel(nn.ModuleList([Residual(hooked(Block()))]))),
        "MambaPy: Block has hooks",
    ),
    "a hook on a layer": (
        lambda: sg.adapters.MambaPy(SimpleModel(nn.ModuleList([hooked(Residual(Block()))]))),
        "MambaPy: Residual has hooks",
    ),
    "a fused kernel": (lambda: sg.adapters.MambaPy(Block(use_cuda=True)), r"Expected MambaConfig\(use_cuda=False\)"),
    "no block": (
        lambda: sg.adapters.MambaPy(nn.Sequential(nn.Linear(2, 2))),
        "Sequential has no config, in_proj, .* expected mambapy.mamba.Mamba or MambaBlock",
    ),
    "layers of another kind": (
        lambda: sg.adapters.MambaPy(SimpleModel(nn.ModuleList([Residual(Block()), nn.Linear(2, 2)]))),
        "Linear has no config",
    ),
    "another version": (lambda: sg.adapters.MambaPy(OtherBlock()), "MambaPy: the module computes something else"),
}


def with_attention(attention: nn.Module) -> nn.TransformerEncoderLayer:
    found = layer()
    found.self_attn = attention
    return found


class SimpleModel(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(sg.InputError, match=message):
        make()


def test_without_the_comparison_a_replaced_part_would_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "TransformerEncoderLayer", Slower)
    with pytest.raises(sg.InputError, match="computes something else"):
        require_exact("Transformer", chunk=8)
    monkeypatch.setattr(adapters, "_require_same", lambda *args: None)
    with pytest.raises(AssertionError, match="off by"):
        require_exact("Transformer", chunk=8)
