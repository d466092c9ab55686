"""What a child measures: a model with its sequence, and the gradient by one method. Weights are drawn from one seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from benchmarks import huggingface as hf
from benchmarks import published as paper
from benchmarks.compiled import GatedLoop
from benchmarks.joint import cases
from slimgrad.bytelm.gradient import layers_computed_twice
from slimgrad.models import Performer, PerformerConfig, to_published
from slimgrad.models.published import published_names
from slimgrad.states.base import State
from slimgrad.sweep import algorithm1, tree
from slimgrad.verification.reference import plain_backward


class Subject(NamedTuple):
    """A model, and what adds its gradient to `.grad`, over the first tokens, in chunks of so many (0: the method's)."""

    model: nn.Module
    gradient: Callable[[int, int], None]
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def gradients(self) -> dict[str, Tensor]:
        found = {name.replace("_orig_mod.", ""): p.grad for name, p in self.model.named_parameters()}
        return self.named({name: g for name, g in found.items() if g is not None})


def of_step(
    model: nn.Module, method: dict[str, Any], inputs: Tensor, targets: Tensor, layered: Any = None, whole: Any = None
) -> Subject:
    """A causal step by slimgrad or by the specification; or plainly.

    Args:
        model: the step.
        method: a `cases.Method`.
        inputs, targets: `[batch, time]`.
        layered: what has the `layers` that checkpointing computes twice; None: the model.
        whole: the model that plain backpropagation runs; None: the step itself.
    """
    kind = method["kind"]
    runs = torch.compile(model, dynamic=False) if kind == cases.COMPILED else model

    def gradient(length: int, chunk: int) -> None:
        model.zero_grad(set_to_none=True)
        few, goals = inputs[:, :length], targets[:, :length]
        chunk = method["chunk"] if not chunk or kind == cases.COMPILED else chunk
        if kind == cases.SPECIFIED:
            by_specification(model, few, goals)
        elif kind in (cases.PLAIN, cases.CHECKPOINT):
            twice = layers_computed_twice(model if layered is None else layered)
            with twice if kind == cases.CHECKPOINT else nullcontext():
                plain_backward(model if whole is None else whole, few, goals)
        else:
            sg.backward(runs, few, goals, chunk=chunk, schedule=sg.Rebuild(tape=method["tape"]))

    return Subject(model, gradient)


def by_specification(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int = 4096) -> None:
    """Algorithm 1, in plain Python lists."""
    spans = [slice(start, start + chunk) for start in range(0, inputs.shape[1], chunk)]

    def step(pair: Any, state: Any) -> tuple[Tensor, Any]:
        outputs, following = model(pair[0], state)
        loss = F.cross_entropy(outputs.flatten(0, 1), pair[1].flatten().long(), reduction="sum")
        return loss / targets.numel(), following

    def widened(leaf: Any) -> Any:
        if isinstance(leaf, State):
            return leaf.with_value(widened(leaf.value))
        return leaf.to(like.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    parameters, pairs = list(model.parameters()), [(inputs[:, span], targets[:, span]) for span in spans]
    like = parameters[0]
    start = tree.map_leaves(widened, model.initial_state(len(inputs)))
    for p, g in zip(parameters, algorithm1.gradients(step, pairs, start, parameters)[1], strict=True):
        p.grad = g


def performer(
    method: dict[str, Any], length: int, double: bool, *, layers: int, width: int, heads: int
) -> Subject:  # fmt: skip
    """Ours; the published code from the same weights; or performer-pytorch's model of the same shape, which differs."""
    tokens = paper.draw(length)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if method["kind"] == cases.PERFORMER_PYTORCH:
        return performer_pytorch(inputs, targets, double, layers, width, heads)
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=layers, width=width, heads=heads))
    if method["kind"] == cases.PUBLISHED:
        theirs = paper.make_published(os.environ["PUBLISHED"], model.config, method["form"])
        theirs.load_state_dict(to_published(model))
        chunk = method["chunk"]
        return Subject(
            theirs, lambda few, smaller: paper.backward_published(theirs, tokens[:, : few + 1], smaller or chunk)
        )
    return of_step(model.double() if double else model, method, inputs, targets)._replace(named=published_names)


def performer_pytorch(inputs: Tensor, targets: Tensor, double: bool, layers: int, width: int, heads: int) -> Subject:
    from performer_pytorch import PerformerLM

    torch.manual_seed(0)
    model = PerformerLM(
        num_tokens=256, max_seq_len=inputs.shape[1], dim=width, depth=layers, heads=heads, causal=True,
        nb_features=width // heads, generalized_attention=True,
    )  # fmt: skip
    model = model.double() if double else model

    def gradient(length: int, chunk: int) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs[:, :length]).flatten(0, 1), targets[:, :length].flatten()).backward()

    return Subject(model, gradient)


class Language(nn.Module):
    """Tokens through a step between an embedding and a head."""

    def __init__(self, step: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.step, self.head = nn.Embedding(256, width), step, nn.Linear(width, 256)

    def initial_state(self, batch_size: int) -> Any:
        return self.step.initial_state(batch_size)

    def forward(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self.step(self.embed(tokens), state)
        return self.head(hidden), state


def gated_loop(method: dict[str, Any], length: int, double: bool) -> Subject:
    """Its tokens one by one, in Python."""
    torch.manual_seed(0)
    model = GatedLoop()
    tokens = torch.randint(0, 64, (8, length + 1))
    return of_step(model.double() if double else model, method, tokens[:, :-1], tokens[:, 1:])


def gru(method: dict[str, Any], length: int, double: bool) -> Subject:
    """torch's own, through the adapter; plain backpropagation runs the same module over the whole sequence."""
    torch.manual_seed(0)
    model = Language(sg.adapters.Recurrent(nn.GRU(128, 128, num_layers=2, batch_first=True)), 128)
    tokens = paper.draw(length)
    return of_step(model.double() if double else model, method, tokens[:, :-1], tokens[:, 1:])


def mambapy(method: dict[str, Any], length: int, double: bool) -> Subject:
    """Its own parallel scan over the whole sequence, its layers computed twice; and the same blocks by the adapter."""
    from mambapy.mamba import Mamba, MambaConfig

    class Whole(nn.Module):
        def __init__(self, language: Language) -> None:
            super().__init__()
            self.language = language

        def initial_state(self, batch_size: int) -> None:
            return None

        def forward(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
            return self.language.head(theirs(self.language.embed(tokens))), state

    torch.manual_seed(0)
    theirs = Mamba(MambaConfig(d_model=64, n_layers=2))
    model = Language(sg.adapters.MambaPy(theirs), 64)
    model = model.double() if double else model
    tokens = paper.draw(length)
    return of_step(model, method, tokens[:, :-1], tokens[:, 1:], layered=theirs, whole=Whole(model))


def huggingface(method: dict[str, Any], length: int, double: bool, *, shape: str) -> Subject:
    """A model of transformers, whose loss is its own. Where it computes in float32 itself, the truth does as well."""
    names = {
        cases.PLAIN: "plain", cases.CHECKPOINT: "checkpointing", cases.OURS: "ours",
        cases.OURS_CHECKPOINT: "ours+checkpointing",
    }  # fmt: skip
    case = hf.Case(shape=shape, method=names[method["kind"]], length=length, chunk=method["chunk"] or 512)
    model = case.build()
    model = model.double() if double else model
    if method["kind"] in (cases.OURS, cases.OURS_CHECKPOINT):
        sg.hf.enable(model, chunk=case.chunk)
    tokens = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(1))

    def gradient(few: int, chunk: int) -> None:
        case.gradient(model, tokens[:, : max(few, 2 * case.chunk)])  # so that a warm-up goes in chunks as well

    return Subject(model, gradient)
