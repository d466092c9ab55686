"""Each adapter's chunked gradient equals plain backpropagation over one whole sequence through the module itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from slimgrad import adapters
from slimgrad.call import model as shared
from slimgrad.states.rows import RowsCarrier
from slimgrad.states.tensors import TensorCarrier
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


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba blocks round two of their parameters to float32; here they do not, so that the comparison is sharp."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def require_exact(name: str, chunk: int, way: str = "backward") -> None:
    """Parameters, inputs, and of a layer that takes one the initial state: chunked against the original, whole."""
    adapter, original, inputs, targets = CASES[name]()
    expected = contract.plain(original, inputs, targets)
    got = contract.chunked(way, adapter, inputs, targets, chunk=chunk)
    if way != "backward" or not isinstance(adapter, adapters.Recurrent):
        got, expected = contract.without_state(got), contract.without_state(expected)
    contract.require_close(got, expected)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("wide")
def test_equals_the_original_over_the_whole_sequence(name: str, chunk: int) -> None:
    require_exact(name, chunk)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("wide")
def test_the_state_and_its_gradient_pass_from_call_to_call(name: str) -> None:
    """Two calls, of 17 steps and 16, with the state handed on and its gradient handed back: the original's, whole."""
    adapter, original, inputs, targets = CASES[name]()
    expected = contract.without_state(contract.plain(original, inputs, targets))
    count, first, second = int((targets != -100).sum()), slice(0, 17), slice(17, None)
    state = sg.evaluate(adapter, inputs[:, first], targets[:, first], chunk=8).final_state
    back, loss, gradients = None, 0.0, []
    for part, begun in ((second, state), (first, None)):
        given = contract.fresh(inputs[:, part])
        result = sg.backward(
            adapter, given, targets[:, part], chunk=8, normalizer=count, state=begun, final_state_grad=back
        )
        back, loss = result.initial_state_grad, loss + result.loss
        gradients.insert(0, given.grad)
    found = contract.collect(adapter, None, None)
    contract.require_close((loss, found | {"input 0": torch.cat(gradients, 1)}), expected)


@pytest.mark.parametrize("way", contract.WAYS)
@pytest.mark.parametrize("name", ["LSTM", "Transformer", "Mamba"])
@pytest.mark.usefixtures("wide")
def test_passes_the_contract(name: str, way: str) -> None:
    """Any way to the gradient, from a state in the middle of life."""
    adapter, _, inputs, targets = CASES[name]()
    for schedule in (sg.Rebuild(), sg.Binomial(2)):
        contract.check(
            lambda: (adapter, inputs, targets), chunk=8, schedule=schedule, way=way, from_state=way == "backward"
        )


@pytest.mark.parametrize("name", MAMBAS)
def test_mamba_with_what_it_rounds(name: str) -> None:
    """`A_log` and `D` are rounded to float32 by the block, and so are their gradients, once per chunk."""
    adapter, original, inputs, targets = CASES[name]()
    _, expected = contract.without_state(contract.plain(original, inputs, targets))
    _, got = contract.without_state(contract.chunked("backward", adapter, inputs, targets, chunk=8))
    rounded = {n for n in expected if n.endswith(("A_log", ".D"))}
    assert len(rounded) >= 2
    for names, tolerance in ((rounded, 1e-6), (expected.keys() - rounded, contract.TOLERANCE)):
        error, worst = contract.worst_error({n: got[n] for n in names}, {n: expected[n] for n in names})
        assert error <= tolerance, (worst, error)


# --- the tests above can fail ---


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("wide")
def test_a_cut_state_gradient_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorCarrier, "roots", lambda self: [])
    monkeypatch.setattr(RowsCarrier, "add_gradient", lambda self, g, first=0: None)
    with pytest.raises(AssertionError, match="off by"):
        require_exact(name, chunk=8)


def test_a_detached_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = adapters.Recurrent.forward

    def detached(self: adapters.Recurrent, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, (h, cells) = forward(self, inputs, state)
        return outputs, (h.detach(), cells.detach())

    monkeypatch.setattr(adapters.Recurrent, "forward", detached)
    with pytest.raises(AssertionError, match="off by"):
        require_exact("LSTM", chunk=8)


@pytest.mark.parametrize("forgotten", ["tail", "h"])
@pytest.mark.usefixtures("wide")
def test_a_forgotten_part_of_mambas_state_is_found(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = adapters._selective_scan

    def forgetful(block: Any, u: Tensor, tail: Tensor, h: Tensor) -> Any:
        given = {"tail": tail, "h": h}
        given[forgotten] = torch.zeros_like(given[forgotten])
        return scan(block, u, **given)

    monkeypatch.setattr(adapters, "_selective_scan", forgetful)
    monkeypatch.setattr(adapters, "_require_same", lambda *args: None)
    with pytest.raises(AssertionError, match="off by"):
        require_exact("Mamba block", chunk=8)


# --- random draws ---


class Headed(nn.Module):
    """An adapter between an embedding and logits."""

    def __init__(self, adapter: nn.Module, width: int = FEATURES) -> None:
        super().__init__()
        self.embed, self.adapter, self.head = nn.Embedding(11, FEATURES), adapter, nn.Linear(width, 11)

    def initial_state(self, batch_size: int) -> Any:
        return self.adapter.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = self.adapter(self.embed(inputs), state)
        return self.head(outputs), state


def with_dropout(kind: str) -> Headed:
    torch.manual_seed(4)
    if kind == "Transformer":
        return Headed(sg.adapters.TransformerLayer(nn.TransformerEncoderLayer(FEATURES, 2, 11, dropout=0.4))).double()
    return Headed(sg.adapters.Recurrent(getattr(nn, kind)(FEATURES, 7, num_layers=3, dropout=0.4)), 7).double()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "Transformer"])
def test_dropout_is_exact(kind: str) -> None:
    model, tokens = with_dropout(kind), torch.randint(0, 11, (BATCH, LENGTH))
    report = sg.verify(model, tokens, chunk=8)  # "sweep": the same draws in one graph
    assert report.passed, report
    assert report.global_errors["sweep"] < contract.TOLERANCE
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(sg.backward(model, tokens, chunk=8).loss))
    assert losses[0] == losses[1] != losses[2]  # drawn, and from the seed


@pytest.mark.parametrize("kind", ["LSTM", "Transformer"])
def test_dropout_that_is_not_replayed_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = with_dropout(kind), torch.randint(0, 11, (BATCH, LENGTH))
    monkeypatch.setattr(shared, "seeded", lambda seed, *devices: nullcontext())
    if kind == "LSTM":
        with pytest.raises(sg.StateMismatchError, match="rebuilt with other bits"):
            sg.backward(model, tokens, chunk=8)
    else:  # of a layer alone no draw reaches the state, but the loss
        with pytest.raises(sg.LossMismatchError):
            sg.loss(model, tokens, chunk=8).backward()


class OnCuda(nn.Module):
    """Hands its adapter inputs that say they are on CUDA."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.adapter = sg.adapters.Recurrent(rnn)

    def initial_state(self, batch_size: int) -> Any:
        return self.adapter.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.adapter(SimpleNamespace(is_cuda=True), state)
        raise NotImplementedError


def test_draws_of_cudnn_are_refused() -> None:
    model = OnCuda(nn.LSTM(FEATURES, 7, num_layers=2, dropout=0.5))
    inputs = torch.randn(BATCH, LENGTH, FEATURES)
    with pytest.raises(sg.InputError, match=r"dropout=0.5 on CUDA: cuDNN draws it .* Expected dropout=0\."):
        sg.backward(model, inputs, torch.zeros(BATCH, LENGTH, dtype=torch.int64), chunk=8)
    with pytest.raises(AttributeError, match="transpose"):  # in eval mode nothing is drawn: it goes on
        sg.backward(model.eval(), inputs, torch.zeros(BATCH, LENGTH, dtype=torch.int64), chunk=8)


# --- layouts, precision, parameters ---


@pytest.mark.parametrize("name", CASES)
def test_starts_where_the_module_starts(name: str) -> None:
    adapter, original, inputs, _ = CASES[name]()
    with torch.no_grad():
        outputs, _ = adapter(inputs, adapter.initial_state(BATCH))
        given = None if isinstance(adapter, adapters.Recurrent) else adapter.initial_state(BATCH)
        expected, _ = original(inputs, given)
    torch.testing.assert_close(outputs, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["LSTM", "Transformer", "Mamba"])
def test_parameters_and_modes_stay_the_modules_own(name: str) -> None:
    adapter, _, _, _ = CASES[name]()
    (child,) = adapter.children()
    assert all(m.training for m in adapter.modules())
    assert [id(p) for p in adapter.parameters()] == [id(p) for p in child.parameters()]
    prefix = next(iter(dict(adapter.named_children())))
    assert set(adapter.state_dict()) == {f"{prefix}.{key}" for key in child.state_dict()}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm: slower, says torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["LSTM", "Transformer", "Mamba"])
def test_runs_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Each dtype is the same in every chunk, and both sweeps come to the same bits."""
    adapter, _, inputs, targets = CASES[name]()
    adapter, inputs = adapter.float(), inputs.float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for schedule in (sg.Rebuild(), sg.Binomial(2)):
            sg.loss(adapter, inputs, targets, chunk=8, schedule=schedule).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("name", ["LSTM", "Transformer"])
def test_parametrised_weights(name: str) -> None:
    """Of both sweeps and of each call, also after the optimiser's step."""
    adapter, original, inputs, targets = CASES[name]()
    of = {"LSTM": ("rnn", "weight_hh_l0"), "Transformer": ("layer.self_attn", "in_proj_weight")}[name]
    nn.utils.parametrizations.weight_norm(adapter.get_submodule(of[0]), of[1])
    for _ in range(2):
        with torch.no_grad():
            for p in adapter.parameters():
                p.mul_(1.1)
        found = contract.without_state(contract.chunked("backward", adapter, inputs, targets, chunk=8))
        contract.require_close(found, contract.without_state(contract.plain(original, inputs, targets)))


# --- what is refused ---


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
        "TransformerLayer: the module computes something else",
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


# --- blocks of the guides that need another package ---


@pytest.mark.parametrize("package", ["lightning", "mambapy"])
@pytest.mark.filterwarnings("ignore")  # the packages' own
def test_the_guides_blocks_that_need_a_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_docs import ROOT, blocks

    page = ROOT / "docs" / "guides.md"
    wanted = [block for block in blocks(page) if block.not_run and block.not_run.startswith(f"needs {package}")]
    assert wanted
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python" and (block.not_run is None or block in wanted):
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    capsys.readouterr()
