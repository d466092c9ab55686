"""Data parallelism: `DDP(sg.Chunked(model))` on two processes equals one process with the whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import slimgrad as sg
from tests.call.processes import refusals, run_processes
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
    said = refusals(ways)

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
    run_processes(_process, (str(tmp_path), 2), 2)
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


def _zero(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a loss_fn returns for a chunk that it leaves out."""
    return outputs.new_zeros(())


def _summed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class _Plain(nn.Module):
    """What `Chunked` computes, in one call."""

    def __init__(self, inner: nn.Module, loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = inner, loss_fn

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, normalizer: float) -> torch.Tensor:
        outputs, _ = self.model(tokens, self.model.initial_state(len(tokens)))
        return (self.loss_fn(outputs, targets) + 0 * outputs.sum()) / normalizer


def _without_targets(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        tokens, targets = (x[rank * 2 : rank * 2 + 2] for x in batch())
        found = {}
        for how in ("no targets", "a constant zero"):
            goals = torch.full_like(targets, -100) if rank == 1 and how == "no targets" else targets
            loss_fn = _zero if rank == 1 and how == "a constant zero" else _summed
            swept, whole = model(), model()
            chunked = DistributedDataParallel(sg.Chunked(swept, chunk=7, loss_fn=loss_fn))
            in_one_call = DistributedDataParallel(_Plain(whole, loss_fn))
            for _ in range(2):  # the second step finds the reducer ready again
                swept.zero_grad()
                whole.zero_grad()
                chunked(tokens, goals, normalizer=17.0).backward()
                in_one_call(tokens, goals, 17.0).backward()
            found[how] = [{name: p.grad for name, p in one.named_parameters()} for one in (swept, whole)]
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()  # nobody leaves while the other still hears from it
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_targets_keeps_nobody_waiting(tmp_path: Path) -> None:
    run_processes(_without_targets, (str(tmp_path), 2), 2)
    for rank in range(2):
        for how, (got, expected) in torch.load(tmp_path / f"{rank}.pt").items():
            assert all(g is not None for g in got.values()), how
            assert any(bool((g != 0).any()) for g in got.values()), how
            error, name = worst_error(got, expected)
            print(how, rank, error)
            assert error <= 1e-12, f"{how}, rank {rank}: {name} is off by {error:.1e}"  # measured 4e-16


def _sharded(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    try:
        mesh = init_device_mesh("cpu", (world_size,))
        tokens, targets = (x[rank * 2 : rank * 2 + 2] for x in batch())
        count = int((batch()[1] != -100).sum())
        swept = model()
        sharded = fully_shard(sg.Chunked(swept, chunk=7), mesh=mesh)
        for _ in range(2):
            swept.zero_grad()
            sharded(tokens, targets, normalizer=count / world_size).backward()
        found: dict[str, object] = {
            "gradients": {name: p.grad.full_tensor() for name, p in swept.named_parameters()},
            "is sharded": all(p.grad.to_local().numel() < p.numel() for p in swept.parameters() if p.shape[0] > 1),
        }
        whole, layer, flat = model(), model(), model()
        fully_shard(whole, mesh=mesh)
        fully_shard(layer.summed, mesh=mesh)
        wrapped = FullyShardedDataParallel(flat, device_id=torch.device("cpu"))
        ways: dict[str, Callable[[], object]] = {
            "backward(fully_shard(model))": lambda: sg.backward(whole, tokens, chunk=7),
            "loss(fully_shard(model))": lambda: sg.loss(whole, tokens, chunk=7),
            "Chunked(fully_shard(model))": lambda: sg.Chunked(whole),
            "a layer that is sharded": lambda: sg.backward(layer, tokens, chunk=7),
            "backward(FSDP(model))": lambda: sg.backward(wrapped, tokens, chunk=7),
            "Chunked(FSDP(model))": lambda: sg.Chunked(wrapped),
        }
        said = refusals(ways)
        torch.save(found | {"refused": said}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_around_chunked_and_no_other_way(tmp_path: Path) -> None:
    run_processes(_sharded, (str(tmp_path), 2), 2)
    expected = {name: g for name, g in plain(model(), *batch())[1].items() if not name.startswith("state")}
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["is sharded"]
        error, name = worst_error(found["gradients"], expected)
        print(rank, error)
        assert error <= 1e-12, f"{name} is off by {error:.1e}"  # measured 4e-16
        for way, message in found["refused"].items():
            assert "fully_shard(slimgrad.Chunked(model" in message, (way, message)
            assert ("FullyShardedDataParallel" if "FSDP" in way else "sharded by fully_shard") in message, (
                way,
                message,
            )
