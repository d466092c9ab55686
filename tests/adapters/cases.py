"""Modules with their adapters, and what each is compared with: the module itself over the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad import adapters
from tests.contract import contract

BATCH, LENGTH, FEATURES = 2, 33, 6
CHUNKS = (1, 5, 8, 16, 33)  # of 8 and 16 one step is left over
# Measured over all cases and chunks: errors of at most 3e-15; with the state's gradient cut, of 0.04 to 0.55.


class Original(nn.Module):
    """The adapter's module over a whole sequence, as its library runs it; parameters keep the adapter's names.

    Args:
        adapter: whose module it is.
        whole: `(inputs [batch, time, features], state)` -> (outputs, final state).
    """

    def __init__(self, adapter: nn.Module, whole: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> None:
        super().__init__()
        for name, child in adapter.named_children():
            self.add_module(name, child)
        self.forward, self.begin = whole, adapter.initial_state

    def initial_state(self, batch_size: int) -> Any:
        return self.begin(batch_size)


class Case(NamedTuple):
    adapter: nn.Module
    original: Original
    inputs: Tensor
    targets: Tensor


def case(adapter: nn.Module, whole: Callable[[Tensor, Any], Any], outputs: int = FEATURES) -> Case:
    """Inputs that take gradients, and the outputs taken for logits; some targets are ignored."""
    targets = torch.randint(0, outputs, (BATCH, LENGTH))
    targets[0, 9:14] = -100
    inputs = torch.randn(BATCH, LENGTH, FEATURES, dtype=torch.float64)
    return Case(adapter, Original(adapter, whole), inputs, targets)


def recurrent(kind: type[nn.RNNBase], **settings: Any) -> Case:
    torch.manual_seed(1)
    rnn = kind(FEATURES, 7, **settings).double()

    def whole(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if rnn.batch_first:
            return rnn(x, state)
        y, state = rnn(x.transpose(0, 1), state)
        return y.transpose(0, 1), state

    return case(sg.adapters.Recurrent(rnn), whole, settings.get("proj_size", 7))


def transformer(**settings: Any) -> Case:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(FEATURES, **({"nhead": 2, "dim_feedforward": 11, "dropout": 0.0} | settings))
    layer = layer.double()
    for p in layer.parameters():  # norms and biases begin at ones and zeros, which hide mistakes
        nn.init.normal_(p, std=0.4)
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)

    def whole(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if layer.self_attn.batch_first:
            return layer(x, src_mask=mask), state
        return layer(x.transpose(0, 1), src_mask=mask).transpose(0, 1), state

    return case(sg.adapters.TransformerLayer(layer), whole)


class Block(nn.Module):
    """A Mamba block from its definition, step by step, with the attributes that mambapy's has.

    Of each channel: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t . h_t + D x_t, with delta, B and C made
    of x_t, which is convolved over `d_conv` steps before.
    """

    def __init__(self, normed: bool = False, taps: int = 4, **config: Any) -> None:
        super().__init__()
        inner, states, rank = 8, 3, 2
        self.config = SimpleNamespace(
            **({"d_inner": inner, "d_state": states, "d_conv": taps, "dt_rank": rank, "pscan": True, "use_cuda": False})
            | config
        )
        self.in_proj = nn.Linear(FEATURES, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.randn(inner, states) - 3)  # slow: memory is long
        self.D = nn.Parameter(torch.randn(inner))
        self.out_proj = nn.Linear(inner, FEATURES, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(n) for n in (rank, states, states)] if normed else [nn.Identity()] * 3)

    def _apply_layernorms(self, *parts: Tensor) -> list[Tensor]:
        return [norm(part) for norm, part in zip(self.norms, parts, strict=True)]

    def selective_scan(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[0], *A.shape), []
        for t in range(x.shape[1]):
            h = (delta[:, t, :, None] * A).exp() * h + (delta * x)[:, t, :, None] * B[:, t, None]
            outputs.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
        return torch.stack(outputs, 1)

    def selective_scan_seq(self, *args: Tensor) -> Tensor:
        return self.selective_scan(*args)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.in_proj(u).chunk(2, -1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        delta, B, C = self._apply_layernorms(*self.x_proj(x).split([2, 3, 3], -1))
        y = self.selective_scan(x, F.softplus(self.dt_proj(delta)), -self.A_log.float().exp(), B, C, self.D.float())
        return self.out_proj(y * F.silu(z))


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mixer, self.norm = block, nn.RMSNorm(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x)) + x


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual(Block()), Residual(Block(normed=True, taps=2, pscan=False))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mamba(build: Callable[[], nn.Module]) -> Case:
    torch.manual_seed(3)
    model = build().double()
    return case(sg.adapters.MambaPy(model), lambda x, state: (model(x), state))


def real_mamba(**settings: Any) -> nn.Module:
    library: Any = pytest.importorskip("mambapy.mamba")
    return library.Mamba(library.MambaConfig(d_model=FEATURES, n_layers=2, d_state=3, **settings))


CASES: dict[str, Callable[[], Case]] = {
    "LSTM": partial(recurrent, nn.LSTM),
    "LSTM of two layers, projected, batch first": partial(
        recurrent, nn.LSTM, num_layers=2, proj_size=5, batch_first=True
    ),
    "GRU of three layers": partial(recurrent, nn.GRU, num_layers=3),
    "GRU without biases, batch first": partial(recurrent, nn.GRU, bias=False, batch_first=True),
    "RNN": partial(recurrent, nn.RNN, batch_first=True),
    "RNN with ReLU": partial(recurrent, nn.RNN, nonlinearity="relu", num_layers=2),
    "Transformer": transformer,
    "Transformer, norm first, batch first": partial(transformer, norm_first=True, batch_first=True),
    "Transformer, GELU, three heads": partial(transformer, activation="gelu", nhead=3, batch_first=True),
    "Transformer, activation of its own, no biases": partial(transformer, activation=nn.PReLU(), bias=False),
    "Mamba block": partial(mamba, Block),
    "Mamba block, convolution of one step": partial(mamba, partial(Block, taps=1)),
    "Mamba": partial(mamba, Blocks),
    "mambapy": partial(mamba, real_mamba),
    "mambapy, norms inside": partial(mamba, partial(real_mamba, inner_layernorms=True, bias=True)),
    "mambapy, one block": partial(mamba, lambda: real_mamba().layers[0].mixer),
    "mambapy, sequential": partial(mamba, partial(real_mamba, pscan=False)),
}
MAMBAS = [name for name in CASES if "amba" in name]


def require_exact(name: str, chunk: int, way: str = "backward") -> None:
    """Parameters, inputs, and of a layer that takes one the initial state: chunked against the original, whole."""
    adapter, original, inputs, targets = CASES[name]()
    expected = contract.plain(original, inputs, targets)
    got = contract.chunked(way, adapter, inputs, targets, chunk=chunk)
    if way != "backward" or not isinstance(adapter, adapters.Recurrent):
        got, expected = contract.without_state(got), contract.without_state(expected)
    contract.require_close(got, expected)
