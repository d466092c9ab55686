"""Models that are refused memory: where a test wants it, or where the operating system does.

A pretended refusal raises what an allocator raises, in chunks that have more tokens than a limit.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from slimgrad.sweep.progress import Progress
from tests.toy_models import Signals

REFUSALS: list[Exception] = [
    MemoryError("pretended"),
    torch.OutOfMemoryError("pretended"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


class Refuser:
    """Refuses memory, at one place, to chunks that have more than `limit` tokens.

    Places: a model's forward, by what the chunk is run for ("forward" the first time, "again" from a kept state,
    "reverse" for its gradient, "retrace"); "loss"; the chunk's backward pass as it "begins", and "halfway", when all
    parameters have their share of the gradient but those of the first layer.

    Attributes:
        progress: of the sweep that is under way; see the fixture `refuse`.
        times: how often it refused.
    """

    def __init__(self, place: str, limit: int) -> None:
        self.place, self.limit = place, limit
        self.progress: Progress | None = None
        self.times = 0

    def at(self, place: str, tokens: int) -> None:
        if place == self.place and tokens > self.limit:
            self.times += 1
            raise type(error := REFUSALS[(self.times - 1) % len(REFUSALS)])(*error.args)

    def in_forward(self, tokens: int) -> None:
        assert self.progress is not None
        self.at(self.progress.carriers[0].purpose.name.lower(), tokens)


Refuse = Callable[..., Refuser]  # (place, limit), as the fixture of that name makes them


class Backward(torch.autograd.Function):
    """Nothing, but that its backward may be refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, refuser: Refuser, place: str) -> Tensor:
        ctx.refuser, ctx.place, ctx.tokens = refuser, place, x.shape[1]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.refuser.at(ctx.place, ctx.tokens)
        return gradients[0], None, None


class Refused(nn.Module):
    """A toy model that a refuser may stop anywhere. It holds functions only, so that nobody looks at what they hold."""

    def __init__(self, model: nn.Module, refuser: Refuser) -> None:
        super().__init__()
        self.model, self.initial_state = model, model.initial_state
        self.in_forward = refuser.in_forward
        self.begin = lambda outputs: Backward.apply(outputs, refuser, "begins")
        if hasattr(model, "advance"):
            self.advance = self._advance
        first = model.read if isinstance(model, Signals) else model.embed
        first.register_forward_hook(lambda module, inputs, output: Backward.apply(output, refuser, "halfway"))

    def _advance(self, inputs: Any, state: Any) -> Any:
        following = self.model.advance(inputs, state)
        self.in_forward(pytree.tree_leaves(inputs)[0].shape[1])
        return following

    def forward(self, inputs: Any, state: Any, *context: Any) -> Any:
        outputs, following = self.model(inputs, state, *context)
        self.in_forward(outputs.shape[1])
        return self.begin(outputs), following


def build(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(3)
    return kind(**options).double()


def sequence(kind: type[nn.Module], time: int) -> tuple[Any, Tensor | None]:
    """Inputs, which take gradients where they can, and targets."""
    tokens = torch.arange(2 * time).reshape(2, time) * 7 % 13
    if kind is not Signals:
        return tokens, None
    left = torch.linspace(-1, 1, 2 * time * 3, dtype=torch.float64).reshape(2, time, 3)
    return {"left": left.sin().requires_grad_(), "right": (5 * left).cos().requires_grad_()}, tokens % 5


def its_own(model: nn.Module) -> Any:
    """All that a sweep swaps, seeds or hooks."""
    return (
        [(name, id(p), p.requires_grad, p._backward_hooks) for name, p in model.named_parameters()],
        [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
        [(module.training, "forward" in vars(module), len(module._forward_hooks)) for module in model.modules()],
        torch.is_grad_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class Squares(nn.Module):
    """Linear attention whose memory is easily counted: `time` x `time` numbers for each layer, and two on the way."""

    def __init__(self, layers: int, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.mixers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.head = nn.Linear(width, 13)

    def initial_state(self, batch_size: int) -> list[sg.PrefixSum]:
        width = self.head.in_features
        return [sg.PrefixSum(self.head.weight.new_zeros(batch_size, width, width)) for _ in self.mixers]

    def forward(self, inputs: Tensor, state: list[sg.PrefixSum]) -> tuple[Tensor, list[sg.PrefixSum]]:
        x, following = self.embed(inputs), []
        for mixer, sums in zip(self.mixers, state, strict=True):
            q, k, v = mixer(x).chunk(3, -1)
            before, after = sums.advance(k.mT @ v)
            x = x + ((q @ k.mT).tril() @ v + q @ before) * 1e-3
            following.append(after)
        return self.head(x), following
