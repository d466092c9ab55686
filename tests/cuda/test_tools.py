"""What goes with a gradient, on the device: `verify`, torch.compile, `Chunked`, readers, sinks."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from tests.contract import contract
from tests.contract.cases import tokens
from tests.cuda.device import DEVICE, IS_CUDA, MODELS, every_model, moved, on_cuda_only, on_device
from tests.toy_models import AllKinds

compiles = pytest.mark.filterwarnings("ignore")  # torch's own, of many kinds, while it compiles


@every_model
def test_verify(name: str) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    report = sg.verify(model, inputs, targets, chunk=16)
    assert report.passed, report
    assert max(finding.error for finding in report.findings) < 1e-12


def test_verify_with_draws_and_in_float32() -> None:
    model = AllKinds(dropout=0.4).to(DEVICE).train()
    report = sg.verify(model, moved(tokens()), chunk=16)
    assert report.passed, report


def test_verify_is_not_blind() -> None:
    class Cut(AllKinds):
        def forward(self, inputs: Tensor, state: Any) -> Any:
            outputs, following = super().forward(inputs, state)
            return outputs, {**following, "tail": following["tail"].detach()}

    report = sg.verify(Cut().to(DEVICE), moved(tokens()), chunk=16)
    assert not report.passed


class Step(nn.Module):
    """What torch.compile is good for: one chunk, small and static."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(13, width), nn.Linear(width, 3 * width), nn.Linear(width, 13)

    def initial_state(self, batch_size: int) -> Any:
        return self.head.weight.new_zeros(batch_size, self.head.in_features)

    def forward(self, inputs: Tensor, state: Tensor) -> Any:
        gate, value, x = self.qkv(self.embed(inputs)).chunk(3, -1)
        y = (torch.sigmoid(gate) * torch.tanh(value)).cumsum(1) + state[:, None]
        return self.head(F.gelu(x + y / 64)), y[:, -1]


@compiles
def test_compiled() -> None:
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("torch.compile needs a C compiler")
    torch._dynamo.reset()
    torch.manual_seed(1)
    model, inputs = Step().to(DEVICE, torch.float64), torch.randint(0, 13, (2, 96), device=DEVICE)
    expected = contract.without_state(contract.plain(model, inputs, None))
    model.compile()
    for way in ("backward", "loss"):
        for schedule in (sg.Rebuild(), sg.Binomial(2)):
            got = contract.chunked(way, model, inputs, None, chunk=16, schedule=schedule)
            error, name = contract.worst_error(contract.without_state(got)[1], expected[1])
            assert error <= contract.TOLERANCE, (way, name, error)


@on_cuda_only
@compiles
@pytest.mark.parametrize("how", ["whole", "layer", "graphed"])
def test_cuda_graphs_are_refused(how: str) -> None:
    """They write over what the sweep still holds: without the refusal a gradient was off by a factor of 1,000."""
    model, inputs = Step().to(DEVICE), torch.randint(0, 13, (2, 96), device=DEVICE)
    if how == "whole":
        model.compile(mode="reduce-overhead")
    elif how == "layer":
        model.qkv = torch.compile(model.qkv, mode="max-autotune")
    else:
        torch.cuda.make_graphed_callables(model.qkv, (torch.randn(2, 16, 32, device=DEVICE, requires_grad=True),))
    for call in (sg.backward, sg.loss, sg.evaluate, sg.outputs):
        with pytest.raises(sg.ModelError, match="runs as CUDA graphs"):
            call(model, inputs, chunk=16)


def test_readers_that_give_pinned_or_device_memory() -> None:
    model, inputs, _ = on_device(MODELS["all kinds"])()
    expected = contract.without_state(contract.plain(model, inputs, None))

    class Buffered:
        batch, length = inputs.shape

        def __init__(self, place: str) -> None:
            self.whole = inputs.to("cpu" if place == "pinned" else DEVICE)
            self.buffer = torch.empty_like(self.whole)
            if place == "pinned" and IS_CUDA:
                self.buffer = self.buffer.pin_memory()

        def read(self, start: int, stop: int) -> Tensor:
            self.buffer.fill_(0)
            return self.buffer[:, : stop - start].copy_(self.whole[:, start:stop])

    for place in ("pinned", "device"):
        result = sg.backward(model, Buffered(place), chunk=9)
        contract.require_close((result.loss, contract.collect(model, None, None)), expected)


def test_sinks() -> None:
    model, inputs, targets = on_device(MODELS["all kinds"])()
    expected = contract.without_state(contract.plain(model, inputs, targets))[1]
    taken: dict[str, Tensor] = {}

    def sink(name: str) -> Any:
        def take(gradient: Tensor) -> None:
            taken[name] = gradient if name not in taken else taken[name] + gradient

        return take

    names = ["head.weight", "embed.weight", "conv.weight"]
    sg.backward(model, inputs, targets, chunk=9, sink={name: sink(name) for name in names})
    found = contract.collect(model, None, None)
    assert not set(names) & set(found)
    error, name = contract.worst_error(found | taken, expected)
    assert error <= contract.TOLERANCE, (name, error)


def test_accumulation_and_hooks() -> None:
    """A second call adds to `.grad`, and a parameter's hook sees one whole gradient a call."""
    model, inputs, targets = on_device(MODELS["gated"])()
    expected = contract.without_state(contract.plain(model, inputs, targets))[1]
    seen: list[Tensor] = []
    model.head.weight.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        sg.backward(model, inputs, targets, chunk=9)
    got = {name: g / 2 for name, g in contract.collect(model, None, None).items()}
    error, name = contract.worst_error(got, expected)
    assert error <= contract.TOLERANCE, (name, error)
    assert len(seen) == 2
    assert float((seen[0] - expected["head.weight"]).norm() / expected["head.weight"].norm()) <= contract.TOLERANCE


def test_a_reverse_sweep_in_inference_of_another_call() -> None:
    """A loss whose backward is called where gradients are off, or inference is on, as plain torch allows."""
    model, inputs, targets = on_device(MODELS["gated"])()
    expected = contract.without_state(contract.plain(model, inputs, targets))[1]
    for context in (torch.no_grad, torch.inference_mode):
        loss = sg.loss(model, inputs, targets, chunk=9)
        with context():
            loss.backward()
        error, name = contract.worst_error(contract.collect(model, None, None), expected)
        assert error <= contract.TOLERANCE, (context, name, error)
