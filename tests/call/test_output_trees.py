"""`sg.outputs`: trees of outputs, leaves of which some are used, leaves without gradient, leaves that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from benchmarks.measure import LiveBytes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import slimgrad as sg
from tests.call.test_outputs import TOKENS, gradients, plain, projected, require_equal
from tests.toy_models import AllKinds, GatedRecurrence, LinearAttention

BATCH, TIME = TOKENS.shape


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Named:
    logits: Any
    narrow: Any
    label: str = "kept"


pytree.register_dataclass(Named, field_names=["logits", "narrow"], drop_field_names=["label"])


class Several(nn.Module):
    """A model whose outputs are made of its logits `[batch, time, 13]` by a function of them."""

    def __init__(self, make: Callable[[Tensor], Any], core: Callable[[], nn.Module] = AllKinds) -> None:
        super().__init__()
        self.core, self.make = core(), make
        self.double()

    def initial_state(self, batch_size: int) -> Any:
        return self.core.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
        logits, state = self.core(inputs, state)
        return self.make(logits), state


def parts(y: Tensor) -> dict[str, Tensor]:
    """Leaves `[batch, time]`, `[batch, time, 13]` and `[batch, time, 13, 2]`, in three types."""
    return {
        "logits": y,
        "wide": y[..., None] * torch.stack([y, y.cos()], -1)[..., :1, :],
        "narrow": y.square().sum(-1),
        "single": y.float(),
        "turned": torch.complex(y, y.sin()),
    }


def real(outputs: Any) -> Any:
    return pytree.tree_map(lambda x: torch.view_as_real(x) if x.is_complex() else x, outputs)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "dict": parts,
    "tuple": lambda y: tuple(parts(y).values()),
    "list": lambda y: [y, y.sum(-1)],
    "named tuple": lambda y: Pair(y.sum(-1), Pair(y, y.sin())),
    "registered dataclass": lambda y: Named(y, y.sum(-1)),
    "nested": lambda y: {"layers": [(y, {"norm": y.norm(dim=-1)}), (y.tanh(), {})], "rest": Named(parts(y), y)},
    "one in a tuple": lambda y: (y,),
    "one leaf twice": lambda y: {"a": y, "b": y},
}


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep(), sg.Every(2), sg.Binomial(2)], ids=str)
@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_trees(make: Callable[[Tensor], Any], schedule: sg.Schedule) -> None:
    model = Several(make)
    outputs, expected = sg.outputs(model, TOKENS, chunk=9, schedule=schedule), plain(model, TOKENS)
    assert pytree.tree_structure(outputs) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6 if x.dtype == torch.float32 else 1e-12, atol=1e-13)
    got = gradients(model, projected(real(outputs)))
    require_equal(got, gradients(model, projected(real(expected))))


def test_a_tree_without_leaves() -> None:
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(sg.ModelError, match=r"no outputs; slimgrad\.outputs expects"):
            sg.outputs(Several(lambda y: {"layers": []}), TOKENS, chunk=9)


USED = ["logits", "wide", "narrow", "single"]


@pytest.mark.parametrize("used", [USED[:1], USED[1:3], USED[3:]], ids=str)
def test_some_leaves_used(used: list[str]) -> None:
    model = Several(parts)
    got = gradients(model, projected([sg.outputs(model, TOKENS, chunk=9)[name] for name in used]))
    require_equal(got, gradients(model, projected([plain(model, TOKENS)[name] for name in used])))


def test_an_absent_cotangent_is_not_zeros() -> None:
    """The square root of zero has an infinite slope: a cotangent of zeros would come out as NaN."""

    def make(y: Tensor) -> dict[str, Tensor]:
        return {"logits": y, "unused": (y - y.detach()).sqrt()}

    model = Several(make)
    outputs = sg.outputs(model, TOKENS, chunk=9)
    require_equal(
        gradients(model, projected(outputs["logits"])), gradients(model, projected(plain(model, TOKENS)["logits"]))
    )
    outputs = sg.outputs(model, TOKENS, chunk=9)
    loss = projected(outputs["logits"]) + 0 * outputs["unused"].sum()
    assert all(g.isnan().any() for name, g in gradients(model, loss).items() if name != "core.head.bias")


def test_no_zeros_are_made_for_what_no_loss_reads() -> None:
    """The peak of a backward pass beside an output 200 times as wide as the one that is read."""
    model = Several(lambda y: {"narrow": y.sum(-1), "wide": y.repeat(1, 1, 200)}, GatedRecurrence)
    peaks = []
    for read in (False, True):
        outputs = sg.outputs(model, TOKENS, chunk=2)
        size, loss = outputs["wide"].nbytes, outputs["narrow"].sum()
        if read:
            loss = loss + outputs["wide"].square().sum()
        with LiveBytes() as live:
            loss.backward()
        peaks.append(live.peak / size)
    assert peaks[0] < 0.5  # measured: 0.22, which is a chunk's output and its checksum
    assert peaks[1] > 1  # measured: 3.0


class Counted(torch.autograd.Function):
    """The identity; counts how often a gradient goes back through it."""

    count = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        Counted.count += 1
        return g


def test_a_chunk_without_cotangent_and_adjoint_runs_no_backward() -> None:
    model = Several(lambda y: (Counted.apply(y), Counted.apply(y.detach())))
    documents = [TOKENS, TOKENS[:, :20]]
    for read, backwards in (([0], 5), ([1], 3), ([0, 1], 8)):
        Counted.count = 0
        outputs = sg.outputs(model, documents, chunk=8)
        got = gradients(model, sum(projected(outputs[i][0]) for i in read))
        assert Counted.count == backwards
        require_equal(got, gradients(model, sum(projected(plain(model, documents[i])[0]) for i in read)))


def test_leaves_that_take_no_gradient() -> None:
    """Integers, booleans, and floats that the model detached, beside a leaf that takes one."""
    model = Several(
        lambda y: {
            "choice": y.argmax(-1),
            "small": (y[..., :2] * 3).to(torch.int8),
            "sure": y > 0,
            "constant": y.detach(),
            "logits": y,
        }
    )
    outputs, expected = sg.outputs(model, TOKENS, chunk=9), plain(model, TOKENS)
    assert [name for name, x in outputs.items() if x.requires_grad] == ["logits"]
    for name in ("choice", "small", "sure"):
        assert torch.equal(outputs[name], expected[name])
    weight = outputs["constant"].square()  # constants of the loss, like any
    got = gradients(model, (outputs["logits"].tanh() * weight * outputs["sure"]).sum())
    loss = (expected["logits"].tanh() * expected["constant"].square() * expected["sure"]).sum()
    require_equal(got, gradients(model, loss))


def test_outputs_of_which_none_takes_a_gradient() -> None:
    model = Several(lambda y: (y.argmax(-1), y.detach()))
    assert [x.requires_grad for x in sg.outputs(model, TOKENS, chunk=9)] == [False, False]


def test_a_leaf_with_a_graph_in_some_chunks() -> None:
    """As where a mask leaves out whole chunks: the others' part of it has its gradient."""

    class Late(Several):
        def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
            y, following = self.core(inputs, state)
            return (y if state["chunks"] % 2 else y.detach()), following

    for late in (Late(lambda y: y), Late(lambda y: y).requires_grad_(False)):
        late.core.embed.requires_grad_(True)
        got = gradients(late, projected(sg.outputs(late, TOKENS, chunk=9)))
        y = plain(late.core, TOKENS)
        pieces = [piece if i % 2 else piece.detach() for i, piece in enumerate(y.split(9, 1))]
        require_equal(got, gradients(late, projected(torch.cat(pieces, 1))))


REFUSED: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("no time axis", lambda y: {"a": y, "b": [y, y.mean(1)]}, r"output ['b'][1] is a tensor [2, 13]; .* [2, 9, ...]"),
    ("a number as tensor", lambda y: (y, y.sum()), r"output [1] is a tensor []; .* [batch, time, ...]"),
    ("no batch axis", lambda y: (y, y[0]), r"output [1] is a tensor [9, 13]"),
    ("another batch", lambda y: {"a": {"b": y[:1]}}, r"output ['a']['b'] is a tensor [1, 9, 13]"),
    ("another length", lambda y: {"a": y[:, 1:]}, r"output ['a'] is a tensor [2, 8, 13]"),
    ("None", lambda y: {"a": y, "b": None}, r"output ['b'] is a NoneType"),
    ("a number", lambda y: Named(y, 0.5), r"output .narrow is a float"),
    ("a string", lambda y: (y, "y"), r"output [1] is a str"),
    ("None alone", lambda y: None, r"output (the output itself) is a NoneType"),
    ("no time axis alone", lambda y: y.mean(1), r"output (the output itself) is a tensor [2, 13]"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_leaves_refused_by_their_path(make: Callable[[Tensor], Any], message: str) -> None:
    model = Several(make)
    pattern = ".*".join(re.escape(part) for part in message.split(".*")) + ".*Leave it out of what forward returns"
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(sg.ModelError, match=pattern):
            sg.outputs(model, TOKENS, chunk=9)
    assert all(p.grad is None for p in model.parameters())
    sg.backward(model.core, TOKENS, chunk=9)  # and the model is as it was


class Changing(Several):
    """Its outputs are made otherwise from the third chunk on."""

    def __init__(self, make: Callable[[Tensor], Any], later: Callable[[Tensor], Any]) -> None:
        super().__init__(make)
        self.later = later

    def forward(self, inputs: Tensor, state: Any) -> tuple[Any, Any]:
        logits, following = self.core(inputs, state)
        return (self.make if state["chunks"] < 2 else self.later)(logits), following


CHANGES: list[tuple[str, Callable[[Tensor], Any], Callable[[Tensor], Any], str]] = [
    ("width", lambda y: y, lambda y: y[..., :3], r"output 0 came as torch.float64 \[2, 9, 3\] in tokens 18 to 26"),
    ("axes", lambda y: (y, y), lambda y: (y, y[..., None]), r"output 1 came as torch.float64 \[2, 9, 13, 1\]"),
    ("dtype", lambda y: y, lambda y: y.float(), r"torch.float32 .* after torch.float64"),
    ("kind", lambda y: y, lambda y: y > 0, r"torch.bool .* after torch.float64"),
    ("structure", lambda y: (y,), lambda y: (y, y), "another structure"),
    ("keys", lambda y: {"a": y}, lambda y: {"b": y}, "another structure"),
    ("container", lambda y: {"a": y}, lambda y: {"a": (y,)}, r"output \['a'\] is a tuple"),
    ("leaf", lambda y: {"a": (y,)}, lambda y: {"a": y}, "another structure"),
    ("dataclass", lambda y: Named(y, y), lambda y: Pair(y, y), "another structure"),
    ("leaf of a dataclass", lambda y: Named(y, y), lambda y: Named(y, (y, y)), "another structure"),
]


@pytest.mark.parametrize(
    ("make", "later", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES]
)
def test_outputs_that_change_from_chunk_to_chunk(make: Callable, later: Callable, message: str) -> None:
    model = Changing(make, later)
    with pytest.raises(sg.ModelError, match=message):
        sg.outputs(model, TOKENS, chunk=9)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 15, 16, 17, 33, 41])
@pytest.mark.parametrize("chunk", [1, 2, 8, 40, 64])
def test_lengths_beside_chunks(length: int, chunk: int) -> None:
    """Also one token more than whole chunks, and sequences shorter than one."""
    model = Several(lambda y: {"logits": y, "choice": y.argmax(-1)}, LinearAttention)
    outputs = sg.outputs(model, TOKENS[:, :length], chunk=chunk)
    got = gradients(model, projected(outputs["logits"]))
    expected = plain(model, TOKENS[:, :length])
    require_equal(got, gradients(model, projected(expected["logits"])))
    assert torch.equal(outputs["choice"], expected["choice"])
