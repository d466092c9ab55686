"""Models and losses for the tests of `Segment`, what a gradient comes to, and a run that saves on its way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from tests.states.test_complex_states import Rotations
from tests.toy_models import AllKinds, CachedAttention, GatedRecurrence, LinearAttention

CHUNK = 8
TOKENS = torch.arange(2 * 41).reshape(2, 41) * 7 % 11
TARGETS = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
# sums, rows and gates alone; then together, with draws that both sweeps must repeat; numbers of other types
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sums": lambda: LinearAttention().double(),
    "rows": lambda: CachedAttention().double(),
    "gates": lambda: GatedRecurrence(dropout=0.1).double(),
    "a mix": lambda: AllKinds(dropout=0.1).double(),
    "complex": lambda: Rotations().double(),
    "bfloat16": lambda: AllKinds().bfloat16(),
    "float32": lambda: AllKinds(width=7),
}


class Biased(LinearAttention):
    """The context is added to the outputs; a number in it scales it."""

    def forward(self, inputs: Tensor, state: Any, context: Any) -> tuple[Tensor, Any]:
        outputs, state = super().forward(inputs, state)
        return outputs + context["scale"] * context["bias"], state

    def advance(self, inputs: Tensor, state: Any, context: Any) -> Any:
        return super().advance(inputs, state)


def built(kind: str) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(3)
    return MODELS[kind]()


def counted(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and how many targets were missed."""
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return {"loss": loss, "missed": ((outputs.argmax(-1) != targets) & (targets != -100)).sum()}


def segment(model: nn.Module, *args: Any, **options: Any) -> sg.Segment:
    """A segment over the tokens, with the same draws each time."""
    torch.manual_seed(5)
    return sg.Segment(model, TOKENS, *args, **{"chunk": CHUNK} | options)


def finished(segment: sg.Segment, *args: Any) -> sg.Result:
    """Both sweeps, or what is left of them."""
    segment.forward()
    return segment.reverse(*args)


def bits(model: nn.Module, result: sg.Result) -> dict[str, Any]:
    """All that a gradient came to."""
    found: dict[str, Any] = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {"loss": result.loss, "number of targets": result.num_targets, **result.metrics}
    for name in ("final_state", "initial_state_grad", "input_grads"):
        found |= {f"{name} {i}": x for i, x in enumerate(pytree.tree_leaves(getattr(result, name)))}
    return {name: x.value if isinstance(x, sg.State) else x for name, x in found.items()}


def different(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of whatever is not the same in every bit."""

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return type(a) is type(b) and a == b
        return a.dtype == b.dtype and torch.equal(a, b)

    return [name for name in {**got, **expected} if not same(got.get(name), expected.get(name))]


def saved_at(folder: Path, event: int, model: nn.Module, *args: Any, **options: Any) -> Path:
    """A folder where both sweeps were saved, and left, after so many chunks; 0: before the first."""
    save_and_stop(segment(model, *args, **options), event, folder)
    return folder


def save_and_stop(one: sg.Segment, event: int, folder: Path) -> None:
    """Save after so many chunks, and leave."""
    count = 0

    def on_chunk(_: sg.Event) -> None:
        nonlocal count
        count += 1
        if count == event:
            one.save(folder)
            raise KeyboardInterrupt

    if event == 0:
        one.save(folder)
        return
    one.on_chunk = on_chunk
    with suppress(KeyboardInterrupt):
        finished(one)
    assert count == event
