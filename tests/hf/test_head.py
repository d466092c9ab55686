"""The head's loss in pieces: exact in float64, as good as plain cross-entropy in narrow dtypes, and in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("transformers")

from slimgrad.hf import head
from slimgrad.hf.head import linear_loss, loss_in_pieces

ROWS, TIME, WIDTH, VOCABULARY = 2, 601, 24, 211  # more tokens than a piece, and no multiple of one


def made(dtype: torch.dtype, bias: bool = True, spread: float = 1.0) -> tuple[Tensor, Tensor, nn.Linear]:
    hidden = (torch.randn(ROWS, TIME, WIDTH) * spread).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS, TIME)).masked_fill(torch.rand(ROWS, TIME) < 0.2, -100)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
    return hidden, targets, layer.to(dtype)


def plain(hidden: Tensor, targets: Tensor, layer: nn.Linear) -> Tensor:
    """As transformers has it: logits widened to float32."""
    logits = layer(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def linear(hidden: Tensor, targets: Tensor, layer: nn.Linear) -> Tensor:
    return linear_loss(hidden.flatten(0, 1), targets.flatten(), layer)


def pieces(hidden: Tensor, targets: Tensor, layer: nn.Linear) -> Tensor:
    return loss_in_pieces(hidden, targets, layer, [p for p in layer.parameters() if p.requires_grad])


Loss = Callable[[Tensor, Tensor, nn.Linear], Tensor]
WAYS: list[Loss] = [linear, pieces]


def run(way: Loss, hidden: Tensor, targets: Tensor, layer: nn.Linear, scale: float = 0.37) -> list[Tensor]:
    """The loss and all gradients, of a loss that is scaled."""
    loss = way(hidden, targets, layer)
    wanted = [x for x in (hidden, *layer.parameters()) if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * scale, wanted)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight", "bias"])
def test_exact_in_float64(way: Loss, bias: bool, frozen: str) -> None:
    hidden, targets, layer = made(torch.float64, bias)
    part = {"hidden": hidden, "weight": layer.weight, "bias": layer.bias}.get(frozen)
    if part is not None:
        part.requires_grad_(False)
    expected, got = run(plain, hidden, targets, layer), run(way, hidden, targets, layer)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    print(way.__name__, errors)
    assert max(errors) <= 1e-13  # measured 7e-16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_as_good_as_plain_in_narrow_dtypes(way: Loss, dtype: torch.dtype, how: str) -> None:
    """Against float64, with the gradient that a mean over all tokens scales."""
    worse: list[tuple[float, float, float]] = []
    for seed in range(3):
        torch.manual_seed(seed)
        hidden, targets, layer = made(torch.float32 if how == "autocast" else dtype, spread=0.5)
        wide = nn.Linear(WIDTH, VOCABULARY).double()
        wide.load_state_dict(layer.state_dict())
        truth = run(plain, hidden.detach().double().requires_grad_(), targets, wide, 1 / 960)
        with torch.autocast("cpu", dtype, enabled=how == "autocast" and dtype != torch.float32):
            found = [run(one, hidden, targets, layer, 1 / 960) for one in (way, plain)]
        # the loss itself is a sum whose errors cancel, by luck on either side
        rounding = torch.finfo(dtype).eps
        assert all(abs(one[0].item() - truth[0].item()) <= rounding * truth[0].item() for one in found)
        for ours, theirs, right in list(zip(*found, truth, strict=True))[1:]:
            assert ours.dtype == theirs.dtype
            distances = [((x.double() - right).norm() / right.norm()).item() for x in (ours, theirs)]
            worse.append((distances[0] / distances[1], *distances))
    print(way.__name__, dtype, how, max(worse))
    assert max(worse)[0] <= 2  # measured 1.15 (float32), 1.0 in 16 bits


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_tokens_that_float16_can_hardly_hold(way: Loss) -> None:
    """A loss that is scaled as GradScaler does: probabilities of 1e-6 are below float16's normal numbers."""
    torch.manual_seed(0)
    hidden = (0.01 * torch.randn(1, 67, WIDTH)).requires_grad_()
    layer, targets = nn.Linear(WIDTH, 30_011), torch.randint(0, 30_011, (1, 67))
    wide = nn.Linear(WIDTH, 30_011).double()
    wide.load_state_dict(layer.state_dict())
    scale = 2.0**13 / targets.numel()
    truth = run(plain, hidden.detach().double().requires_grad_(), targets, wide, scale)
    with torch.autocast("cpu", torch.float16):
        found = [run(one, hidden, targets, layer, scale) for one in (way, plain)]
    for ours, theirs, right in list(zip(*found, truth, strict=True))[1:]:
        distances = [((x.double() - right).norm() / right.norm()).item() for x in (ours, theirs)]
        print(way.__name__, distances)
        assert distances[0] <= 2 * distances[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", [-5, VOCABULARY])
def test_targets_that_are_no_tokens(way: Loss, target: int) -> None:
    hidden, targets, layer = made(torch.float32)
    targets[1, 3] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        plain(hidden, targets, layer)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        way(hidden, targets, layer)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_predict(way: Loss) -> None:
    hidden, targets, layer = made(torch.float64)
    found = run(way, hidden, torch.full_like(targets, -100), layer)
    assert all(not x.any() for x in found)


class Largest(TorchDispatchMode):
    """The largest tensor that is made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.shape = 0, ()

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.numel() > self.elements:
                self.elements, self.shape = x.numel(), tuple(x.shape)
        return found


@pytest.mark.parametrize("way", [*WAYS, plain])
def test_no_tensor_of_all_tokens_by_the_vocabulary(way: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PIECE", 16)
    tokens = torch.randn(2, 80, 4, requires_grad=True)
    layer, targets = nn.Linear(4, 1000), torch.randint(0, 1000, (2, 80))
    with Largest() as largest:
        way(tokens, targets, layer).backward()
    if way is plain:
        assert largest.elements == 160 * 1000
    else:
        assert largest.elements == 16 * 1000, largest.shape
