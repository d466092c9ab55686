"""States and their gradients between processes: what is sent arrives, and one sequence over two is one sequence."""

from __future__ import annotations

import enum
import os
import signal
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils import _pytree as pytree

import slimgrad as sg
from tests.call.processes import run_processes
from tests.call.segments import CHUNK, TARGETS, TOKENS, built, counted
from tests.contract.contract import worst_error

PARTS = [slice(0, 21), slice(21, 41)]
COUNT = int((TARGETS != -100).sum())
KINDS = ("sums", "rows", "gates", "a mix", "complex")


class Mood(enum.Enum):
    MAJOR = 1


class Pair(NamedTuple):
    h: Any
    mark: Any


@dataclass
class Cell:
    h: Any
    c: Any


pytree.register_dataclass(Cell)


def states() -> dict[str, Any]:
    """Of every kind, in every container, with layouts of all sorts."""
    torch.manual_seed(0)
    c = torch.randn(2, 3, dtype=torch.complex64)
    return {
        "sums and rows": {"S": sg.PrefixSum(torch.randn(3, 4)), "rows": [sg.Growing(torch.randn(2, 3, 5)), None]},
        "nothing yet": (sg.Growing(torch.zeros(2, 0, 5)), sg.PrefixSum(torch.tensor(7))),
        "dtypes": [torch.randn(3).to(d) for d in (torch.bfloat16, torch.float64, torch.int64, torch.bool)],
        "layouts": [torch.randn(4, 5).t(), torch.randn(3, 1).expand(3, 4), torch.randn(6)[::2], torch.tensor(3.0)],
        "complex": [c, c.conj(), c.conj().imag, sg.PrefixSum(c.t())],
        "of a graph": torch.randn(3, requires_grad=True) * 2,
        "values": [None, True, 2**70, float("inf"), "text", b"\x00", Mood.MAJOR, torch.float16],
        "containers": OrderedDict(b=Pair(torch.randn(2), 3), a=Cell(torch.randn(2), None)),
        "keys": {(0, 1): torch.randn(2), 7: torch.randn(1)},
        "one tensor": torch.randn(2, 2),
        "nothing": None,
    }


def leaves(tree: Any) -> list[Any]:
    return [x.value if isinstance(x, sg.State) else x for x in pytree.tree_leaves(tree)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.resolve_conj(), b)
    return type(a) is type(b) and a == b


def _meet(folder: str, name: str, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, name)), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def _send_and_receive(rank: int) -> None:
    for name, state in states().items():
        if rank == 0:
            number_of_bytes = sg.send_state(state, to=1)
            tensors = [x for x in leaves(state) if isinstance(x, Tensor)]
            assert number_of_bytes == sum(x.numel() * x.element_size() for x in tensors), name
            assert not [x for x in tensors if x.requires_grad and x.is_leaf], name
            continue
        got = sg.receive_state(source=0)
        assert pytree.tree_structure(got) == pytree.tree_structure(state), name
        kinds = zip(pytree.tree_leaves(got), pytree.tree_leaves(state), strict=True)
        assert all(type(a) is type(b) for a, b in kinds), name
        assert all(same(a, b) for a, b in zip(leaves(state), leaves(got), strict=True)), name
        assert not any(x.requires_grad for x in leaves(got) if isinstance(x, Tensor)), name


# --- one sequence over two processes ---


def _half(rank: int, kind: str, **options: Any) -> sg.Segment:
    model = built(kind).eval()  # the halves draw from seeds of their own
    return sg.Segment(
        model, TOKENS[:, PARTS[rank]], TARGETS[:, PARTS[rank]], chunk=CHUNK, loss_fn=counted, **options
    )  # fmt: skip


def _found(one: sg.Segment, result: sg.Result) -> dict[str, Tensor]:
    """What is added up over the processes."""
    model = one._call.model
    # the first half alone asks for an initial state
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return grads | {"loss": result.loss, "missed": result.metrics["missed"]}


def _one_sequence(rank: int, folder: str) -> None:
    for kind in KINDS:
        swept: Counter[str] = Counter()
        state = sg.receive_state(0) if rank == 1 else None
        one = _half(rank, kind, state=state, on_chunk=lambda event, swept=swept: swept.update([event.phase]))
        final = one.forward()
        if rank == 0:
            sg.send_state(final, 1)
        result = one.reverse(1 / COUNT, sg.receive_state(1) if rank == 0 else None)
        if rank == 1:
            sg.send_state(result.initial_state_grad, 0)
        assert swept == {"forward": 3, "reverse": 3}, (kind, swept)  # nothing twice
        found = _found(one, result)
        for x in found.values():
            dist.all_reduce(x)
        torch.save(found, Path(folder, f"{kind} {rank}.pt"))


def _both(rank: int, folder: str) -> None:
    _meet(folder, "meeting", rank)
    _send_and_receive(rank)
    _one_sequence(rank, folder)
    dist.destroy_process_group()


def whole(kind: str) -> dict[str, Tensor]:
    model = built(kind).eval()
    result = sg.backward(model, TOKENS, TARGETS, chunk=CHUNK, loss_fn=counted)
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"loss": result.loss, "missed": result.metrics["missed"]}


def test_two_processes(tmp_path: Path) -> None:
    """What is sent arrives as it was, and the parts of the gradient add up."""
    run_processes(_both, (str(tmp_path),), 2)
    for kind in KINDS:
        for rank in (0, 1):
            error, name = worst_error(torch.load(tmp_path / f"{kind} {rank}.pt"), whole(kind))
            assert error < 1e-12, (kind, rank, name)  # measured: at most 4e-16


# --- and one of the two is killed ---


def _first(folder: str) -> None:
    """Has swept its half forward, and keeps it while the other is killed and comes back."""
    _meet(folder, "before", 0)
    swept: Counter[str] = Counter()
    one = _half(0, "a mix", on_chunk=lambda event: swept.update([event.phase]))
    sg.send_state(one.forward(), 1)
    with pytest.raises(RuntimeError):  # the other has gone
        sg.receive_state(1)
    dist.destroy_process_group()
    _meet(folder, "after", 0)
    result = one.reverse(1 / COUNT, sg.receive_state(1))
    assert swept == {"forward": 3, "reverse": 3}
    _deliver(folder, 0, one, result)


def _second(folder: str) -> None:
    """Is killed in the middle of its way back, as it has saved."""
    _meet(folder, "before", 1)
    one = _half(1, "a mix", state=sg.receive_state(0))

    def on_chunk(event: sg.Event) -> None:
        one.save(Path(folder, "saved"))
        if event.phase == "reverse" and event.start == CHUNK:
            os.kill(os.getpid(), signal.SIGKILL)

    one.on_chunk = on_chunk
    one.forward()
    one.reverse(1 / COUNT)


def _second_again(folder: str) -> None:
    _meet(folder, "after", 1)
    swept: Counter[str] = Counter()
    one = sg.Segment.load(
        Path(folder, "saved"), built("a mix").eval(), TOKENS[:, PARTS[1]], TARGETS[:, PARTS[1]], loss_fn=counted,
        on_chunk=lambda event: swept.update([event.phase]),
    )  # fmt: skip
    result = one.reverse()
    assert swept == {"reverse": 1}  # two of three were done
    sg.send_state(result.initial_state_grad, 0)
    _deliver(folder, 1, one, result)


def _deliver(folder: str, rank: int, one: sg.Segment, result: sg.Result) -> None:
    found = _found(one, result)
    for x in found.values():
        dist.reduce(x, 0)
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_process_comes_back(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    first, second = (context.Process(target=run, args=(str(tmp_path),)) for run in (_first, _second))
    first.start()
    second.start()
    second.join(60)
    assert second.exitcode == -signal.SIGKILL
    again = context.Process(target=_second_again, args=(str(tmp_path),))
    again.start()
    for process in (first, again):
        process.join(60)
        assert process.exitcode == 0
    error, name = worst_error(torch.load(tmp_path / "found.pt"), whole("a mix"))
    assert error < 1e-12, name  # measured: 2e-16
