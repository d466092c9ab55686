"""CUDA graphs overwrite what a sweep still holds: every way to ask torch for them is recognised, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.call.cudagraphs import cuda_graphed, refuse_cuda_graphs
from tests.toy_models import GatedRecurrence

# torch's own compiler uses parts of torch that are deprecated, when it is first loaded
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
WITH: list[dict[str, Any]] = [
    {"mode": "reduce-overhead"},
    {"mode": "max-autotune"},
    {"options": {"triton.cudagraphs": True}},
    {"backend": "cudagraphs"},
]
WITHOUT: list[dict[str, Any]] = [
    {},
    {"mode": "max-autotune-no-cudagraphs"},
    {"options": {"max_autotune": False}},
    {"backend": "eager"},
    {"backend": "aot_eager"},
]


class Holder(GatedRecurrence):
    """Calls something that it holds."""

    held: Any = None


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def whole(**options: Any) -> nn.Module:
    return torch.compile(GatedRecurrence(), **options)


def by_its_method(**options: Any) -> nn.Module:
    model = GatedRecurrence()
    model.compile(**options)
    return model


def a_submodule(**options: Any) -> nn.Module:
    model = GatedRecurrence()
    model.value = torch.compile(model.value, **options)
    return model


def a_submodule_by_its_method(**options: Any) -> nn.Module:
    model = GatedRecurrence()
    model.value.compile(**options)
    return model


def a_function_held(**options: Any) -> nn.Module:
    model = Holder()
    model.held = torch.compile(doubled, **options)
    return model


def its_forward_replaced(**options: Any) -> nn.Module:
    model = GatedRecurrence()
    model.forward = torch.compile(model.forward, **options)
    return model


def a_method_decorated(**options: Any) -> nn.Module:
    class Decorated(GatedRecurrence):
        @torch.compile(**options)
        def forward(self, inputs: Tensor, state: Any) -> Any:
            return super().forward(inputs, state)

    return Decorated()


def a_method_inherited(**options: Any) -> nn.Module:
    class Further(type(a_method_decorated(**options))):
        pass

    return Further()


WAYS = [
    whole, by_its_method, a_submodule, a_submodule_by_its_method, a_function_held, its_forward_replaced,
    a_method_decorated, a_method_inherited,
]  # fmt: skip


@pytest.mark.parametrize("options", WITH, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_recognised(way: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    assert [*cuda_graphed(way(**options))]


@pytest.mark.parametrize("options", WITHOUT, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_else_is(way: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    assert not [*cuda_graphed(way(**options))]


@pytest.mark.parametrize("way", WAYS)
def test_torchs_own_configuration_asks_for_them_too(way: Callable[..., nn.Module]) -> None:
    import torch._inductor.config as inductor

    model = way()
    with inductor.patch({"triton.cudagraphs": True}):
        assert [*cuda_graphed(model)]
        assert not [*cuda_graphed(GatedRecurrence())]
    assert not [*cuda_graphed(model)]


def test_graphed_callables_and_graphs() -> None:
    """torch makes them on a CUDA device alone: here are functions of the module that makes them."""
    made: dict[str, Any] = {}
    exec("def forward(*args): ...\nclass Graph: ...", {"__name__": "torch.cuda.graphs"}, made)
    model = GatedRecurrence()
    model.value.forward = made["forward"]  # what torch.cuda.make_graphed_callables does to a module
    assert [*cuda_graphed(model)] == ["value.forward"]
    for held in (made["forward"], made["Graph"]()):
        model = Holder()
        model.held = held
        assert [*cuda_graphed(model)] == ["Holder.held"]


@pytest.mark.parametrize("call", [sg.backward, sg.loss, sg.evaluate, sg.outputs, sg.token_loss, sg.Segment])
def test_refused_before_any_work(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(GatedRecurrence):
        """As far as anybody asks where its weights are."""

        def buffers(self, recurse: bool = True) -> Any:
            return [type("Somewhere", (), {"device": torch.device("cuda")})]

        def forward(self, inputs: Tensor, state: Any) -> Any:
            raise AssertionError

    model = OnCuda()
    model.value.compile(mode="reduce-overhead")
    with pytest.raises(sg.ModelError, match=r"value runs as CUDA graphs.*Compile it without mode="):
        call(model, torch.zeros(1, 9, dtype=torch.int64), chunk=3)


def test_a_loss_function_too() -> None:
    model = nn.Linear(2, 2)
    model.buffers = lambda: [type("Somewhere", (), {"device": torch.device("cuda")})]
    refuse_cuda_graphs(model, doubled)
    with pytest.raises(sg.ModelError, match="loss_fn runs as CUDA graphs"):
        refuse_cuda_graphs(model, torch.compile(doubled, mode="reduce-overhead"))


def test_on_a_cpu_there_are_none() -> None:
    """These modes mean something else there, and are right: nothing is refused."""
    refuse_cuda_graphs(by_its_method(mode="reduce-overhead"))
