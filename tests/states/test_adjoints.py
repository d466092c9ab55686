"""The gradient of a state is a tensor of its own: neither a part of a chunk's gradient, nor of a buffer of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.models import Windowed
from slimgrad.states.tensors import TensorCarrier
from slimgrad.sweep.progress import Progress
from tests.toy_models import CachedAttention


@pytest.mark.parametrize("kind", [lambda: Windowed(8, window=4), CachedAttention], ids=["window", "rows"])
def test_it_holds_nothing_but_itself(kind: Callable[[], nn.Module]) -> None:
    result = sg.backward(kind(), torch.randint(13, (1, 96)), chunk=32)
    found = [x for x in pytree.tree_leaves(result.initial_state_grad) if isinstance(x, Tensor)]
    assert found
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in found)


def test_on_its_way_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    norm = Progress.adjoint_norm

    def looked_at(progress: Progress) -> float:
        adjoints = [c.adjoint() for c in progress.carriers if isinstance(c, TensorCarrier)]
        sizes.extend(x.untyped_storage().nbytes() - x.nbytes for x in adjoints if x is not None)
        return norm(progress)

    monkeypatch.setattr(Progress, "adjoint_norm", looked_at)
    sg.backward(Windowed(8, window=4), torch.randint(13, (1, 96)), chunk=32, on_chunk=lambda event: None)
    assert len(sizes) == 3
    assert not any(sizes)
