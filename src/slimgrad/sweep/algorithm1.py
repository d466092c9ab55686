"""Algorithm 1 of "Sub-Linear Memory: How to Make Performers SLiM" (NeurIPS 2021), as the paper states it.

    n, N    a chunk's number, the number of chunks
    L(n)    the loss of chunk n; the sequence's loss is their sum
    B(n)    the state after chunk n: all that chunk n + 1 knows of the chunks before it; B(0) is the initial state
    G(n)    the gradient, with respect to B(n), of the loss of all chunks after n
    Phi     L(n) + <G(n), B(n)>, G(n) held constant: its gradients are what chunk n adds to those of the sequence

This is the specification. The library finds the same gradients without keeping every state, and checks what is taken on
trust here: that a step depends on nothing but its two arguments and the parameters.
"""
# pyright: reportConstantRedefinition=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimgrad.states.base import State
from slimgrad.sweep import tree

Step = Callable[[tree.Tree, tree.Tree], tuple[Tensor, tree.Tree]]  # (inputs of chunk n, B(n-1)) -> (L(n), B(n))


def gradients(
    step: Step, chunks: Sequence[tree.Tree], start: tree.Tree, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[list[Tensor]], list[Tensor]]:
    """The loss, and its gradients: of the parameters, of each chunk's inputs, of the initial state `start`."""
    loss, B = torch.zeros(()), [tree.map_leaves(apart, start)]  # B(0) may be made of parameters: it keeps its graph
    with torch.no_grad():
        for inputs in chunks:
            L, state = step(inputs, B[-1])
            loss = loss + L
            B.append(tree.map_leaves(apart, state))
    of_parameters, of_inputs = [torch.zeros_like(p) for p in parameters], list[list[Tensor]]()
    G = [torch.zeros_like(b) for b in tensors(B.pop())]  # no chunk comes after N
    for chunk in reversed(chunks):
        inputs, before = tree.map_leaves(apart, chunk), B.pop()
        L, after = step(inputs, before)
        Phi = L + sum((g.conj() * b).real.sum() for g, b in zip(G, tensors(after), strict=True))
        wanted = [parameters, tensors(inputs), tensors(before)]
        found = iter(torch.autograd.grad(Phi, [x for part in wanted for x in part], materialize_grads=True))
        added, of_chunk, G = ([next(found) for _ in part] for part in wanted)
        of_parameters, of_inputs = [*map(torch.add, of_parameters, added)], [of_chunk, *of_inputs]
    return loss, of_parameters, of_inputs, G


def apart(x: Any) -> Any:
    """A leaf of a tree, by itself and taking gradients; under `no_grad` also without its graph."""
    if isinstance(x, State):
        return x.with_value(apart(x.value))
    return x.view_as(x).requires_grad_(x.is_floating_point() or x.is_complex()) if isinstance(x, Tensor) else x


def tensors(state: tree.Tree) -> list[Tensor]:
    """The tensors of a tree that have gradients: real and complex, no integers."""
    values = [x.value if isinstance(x, State) else x for x in tree.leaves(state)]
    return [x for x in values if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
