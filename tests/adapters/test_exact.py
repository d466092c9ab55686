"""Each adapter's chunked gradient equals plain backpropagation over one whole sequence through the module itself."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad import adapters
from slimgrad.call import model as shared
from slimgrad.states.rows import RowsCarrier
from slimgrad.states.tensors import TensorCarrier
from tests.adapters.cases import BATCH, CASES, CHUNKS, FEATURES, LENGTH, MAMBAS, require_exact
from tests.contract import contract


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
