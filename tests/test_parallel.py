"""Data parallelism: `DDP(sg.Chunked(model))` on two processes equals one process with the whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import slimgrad as sg
from tests.contract.contract import collect, plain, worst_error
from tests.toy_models import AllKinds

BATCH, LENGTH = 4, 33


def model() -> AllKinds:
    torch.manual_seed(8)
    return AllKinds().double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and targets of which the second half of the batch has far fewer."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 13, (BATCH, LENGTH), generator=generator)
    targets = torch.randint(0, 13, (BATCH, LENGTH), generator=generator)
    targets[2:, 5:] = -100
    return tokens, targets


def _process(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    try:
        swept = model()
        fired: dict[str, int] = {}
        for name, parameter in swept.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: fired.update({name: fired.get(name, 0) + 1})
            )
        ddp = DistributedDataParallel(sg.Chunked(swept, chunk=7))
        tokens, targets = (x[rank * 2 : rank * 2 + 2] for x in batch())
        count = int((batch()[1] != -100).sum())
        losses = []
        for _ in range(2):  # the second step finds the reducer ready again
            swept.zero_grad()
            fired.clear()
            loss = ddp(tokens, targets, normalizer=count / world_size)
            loss.backward()
            losses.append(float(loss.detach()))
        found = {"losses": losses, "fired": dict(fired)}
        with ddp.no_sync():
            ddp(tokens, targets, normalizer=count / world_size).backward()
        ddp(tokens, targets, normalizer=count / world_size).backward()
        accumulated = {name: p.grad.clone() for name, p in swept.named_parameters()}
        swept.zero_grad()
        ddp(tokens, targets, normalizer=count / world_size).backward()
        gradients = {name: p.grad for name, p in swept.named_parameters()}
        found |= {"accumulated": accumulated, "gradients": gradients, "refused": _refusals(swept)}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _refusals(swept: AllKinds) -> dict[str, str]:
    """What the wrong ways round say; and that a dead reference among the live objects disturbs nobody."""
    tokens, _ = batch()
    inside_out = DistributedDataParallel(model())
    ways: dict[str, Callable[[], object]] = {
        "Chunked(DDP)": lambda: sg.Chunked(inside_out),
        "backward(DDP)": lambda: sg.backward(inside_out, tokens, chunk=7),
        "loss(DDP.module)": lambda: sg.loss(inside_out.module, tokens, chunk=7),
        "token_loss(DDP.module)": lambda: sg.token_loss(inside_out.module, tokens, chunk=7),
        "backward of what Chunked wraps": lambda: sg.backward(swept, tokens, chunk=7),
    }
    said = {}
    for name, way in ways.items():
        try:
            way()
            said[name] = "nothing"
        except sg.ModelError as error:
            said[name] = str(error)

    class Gone:
        pass

    gone = Gone()
    proxy = weakref.proxy(gone)
    del gone
    free = model()
    sg.backward(free, tokens, chunk=7)  # a model of its own is free, whatever else lives
    said["free"] = "fine" if free.head.weight.grad is not None else "no gradient"
    del proxy
    return said


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path), 2), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = model()
    loss, expected = plain(whole, *batch())
    expected = {name: g for name, g in expected.items() if not name.startswith("state")}
    sg.Chunked(whole, chunk=7)(*batch()).backward()
    error, name = worst_error(collect(whole, None, None), expected)
    print(
        "DDP",
        error,
        [worst_error(o["gradients"], expected) for o in found],
        [worst_error(o["accumulated"], {n: 3 * g for n, g in expected.items()}) for o in found],
    )
    assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
    for one in found:
        error, name = worst_error(one["gradients"], expected)
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
        assert one["losses"][0] == one["losses"][1]
        assert one["fired"] == dict.fromkeys(expected, 1)
        assert one["refused"].pop("free") == "fine"
        for way, message in one["refused"].items():
            assert "DistributedDataParallel" in message, way
            assert "Wrap the other way round" in message, way
            assert "DistributedDataParallel(slimgrad.Chunked(model, ...))" in message, way
    # the mean of both losses is that of the whole batch
    assert sum(one["losses"][0] for one in found) / 2 == pytest.approx(float(loss), rel=1e-13)
    for one in found:  # a step, one under no_sync, and one that synchronises both
        error, name = worst_error(one["accumulated"], {name: 3 * g for name, g in expected.items()})
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
