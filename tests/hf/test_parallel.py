"""Several processes around an enabled model, as users wrap it: gradients equal those of one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402
from tests.call.processes import refusals, run_processes  # noqa: E402
from tests.hf.models import KINDS, enable, gradients, large, llama, sweeps, taken, tokens, worst  # noqa: E402

EXACT, WORLD = 1e-10, 2  # measured 2e-15 to 3e-14
ROWS = tokens(4, 37)
LABELS = ROWS.masked_fill(torch.rand(ROWS.shape, generator=torch.Generator().manual_seed(3)) < 0.3, -100)
COUNT = int((LABELS[:, 1:] != -100).sum())


def kinds() -> dict[str, Any]:
    """Their certificates are made once, by whoever asks first."""
    torch.manual_seed(0)  # decays are drawn, too
    return {"llama": large(llama(tie_word_embeddings=True)), "hybrid": large(KINDS["hybrid"]())}


def in_processes(rank: int, folder: str, certificates: str, work: Callable[[int, Any], Any]) -> None:
    torch.set_num_threads(1)
    os.environ["SLIMGRAD_CACHE"] = certificates
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=100),
    )
    try:
        mine = slice(2 * rank, 2 * rank + 2)
        found = work(rank, {"input_ids": ROWS[mine], "labels": LABELS[mine], "num_items_in_batch": COUNT / WORLD})
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(work: Callable[[int, Any], Any], folder: Path) -> list[Any]:
    for model in kinds().values():
        slimgrad.hf.certify(model)
    run_processes(in_processes, (str(folder), os.environ["SLIMGRAD_CACHE"], work), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def whole(model: Any) -> dict[str, Tensor]:
    """One process, all rows, without slimgrad."""
    return gradients(model, input_ids=ROWS, labels=LABELS, num_items_in_batch=COUNT)[1]


DDP: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama static": {"static_graph": True},
    "llama bucketed": {"bucket_cap_mb": 0.001},
    "hybrid": {},
}


def distributed(rank: int, given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in DDP.items():
        one = enable(kinds()[name.split()[0]])
        ddp = DistributedDataParallel(one, **options)
        for _ in range(2):  # the second step finds the reducer ready again
            one.zero_grad()
            with widened():
                ddp(**given).loss.backward()
        found[name] = taken(one)
        assert sweeps(one) == 2
    with ddp.no_sync(), widened():
        ddp(**given).loss.backward()
    with widened():
        ddp(**given).loss.backward()
    found["hybrid accumulated"] = {n: g / 2 for n, g in taken(one).items()}
    with widened():  # a loss of one's own, on logits
        logits = ddp(input_ids=given["input_ids"]).logits[:, :-1].flatten(0, 1)
        goal = given["labels"][:, 1:].flatten()
        (torch.nn.functional.cross_entropy(logits, goal, reduction="sum") * WORLD / COUNT).backward()
    found["hybrid logits"] = taken(one)
    return found


@pytest.mark.slow
def test_ddp_around_an_enabled_model(tmp_path: Path) -> None:
    expected = {kind: whole(model) for kind, model in kinds().items()}
    for found in run(distributed, tmp_path):
        errors = {name: worst(got, expected[name.split()[0]]) for name, got in found.items()}
        print(errors)
        assert len(errors) == 6
        assert max(errors.values()) <= EXACT


def sharded(rank: int, given: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {}
    for name in ("llama", "llama enabled after", "llama resharded", "hybrid"):
        one = kinds()[name.split()[0]]
        if "after" not in name:
            enable(one)
        fully_shard(one, mesh=mesh, reshard_after_forward=True if "resharded" in name else None)
        if "after" in name:
            enable(one, check=False)
        for _ in range(2):
            one.zero_grad()
            with widened():
                one(**given).loss.backward()
        grads = taken(one)
        assert all(g.to_local().numel() < g.numel() for g in grads.values() if g.shape[0] > 1)
        found[name] = {n: g.full_tensor() for n, g in grads.items()}
        assert sweeps(one) == 2
    layers, base, late = (large(llama()) for _ in range(3))
    enable(layers)
    for layer in layers.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)
    fully_shard(enable(base).model, mesh=mesh)
    fully_shard(base, mesh=mesh)
    fully_shard(late.model.layers[0], mesh=mesh)
    ways: dict[str, Callable[[], object]] = {
        "each layer": lambda: layers(**given),
        "the base": lambda: base(**given),
        "a layer, enabled after": lambda: slimgrad.hf.enable(late, check=False),
    }
    return found | {"refused": refusals(ways)}


@pytest.mark.slow
def test_fsdp2_with_the_model_as_its_only_unit(tmp_path: Path) -> None:
    expected = {kind: whole(model) for kind, model in kinds().items()}
    for found in run(sharded, tmp_path):
        for way, message in found.pop("refused").items():
            assert "is a unit of fully_shard" in message, (way, message)
            assert "fully_shard(model)" in message, (way, message)
        errors = {name: worst(got, expected[name.split()[0]]) for name, got in found.items()}
        print(errors)
        assert len(errors) == 4
        assert max(errors.values()) <= EXACT


def prepared(model: Any, given: dict[str, Any], when: str | None) -> tuple[float, dict[str, Tensor], Any]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if when == "before":
        slimgrad.hf.enable(model, chunk=13)
    made, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if when == "after":
        slimgrad.hf.enable(made, chunk=13)
    try:
        loss = made(**given).loss
        assert loss.dtype == torch.float32
        accelerator.backward(loss)
        if when is not None:
            assert sweeps(model) == 1
        return loss.item(), taken(made), made
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared_by_accelerate_in_bfloat16(when: str) -> None:
    given = {"input_ids": ROWS, "labels": LABELS}
    exact = gradients(large(llama()), **given)[1]
    plain = prepared(large(llama()).float(), given, None)
    got = prepared(large(llama()).float(), given, when)
    errors = [worst(grads, exact) for _, grads, _ in (got, plain)]
    print(when, errors, got[0], plain[0])
    assert got[0] == pytest.approx(plain[0], rel=1e-3)
    assert min(errors) > 1e-3  # it is bfloat16
    assert errors[0] <= 2 * errors[1]  # measured 1.04


def test_copies_of_a_prepared_model_run_their_own_forward() -> None:
    """Accelerate puts functions around a forward that it holds; a copy shares them (reference models, averages)."""
    given = {"input_ids": ROWS, "labels": LABELS}
    _, _, model = prepared(large(llama()).float(), given, "before")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    loss = other(**given).loss
    loss.backward()
    assert sweeps(other) == 2
    assert sweeps(model) == 1
    got = taken(other)
    assert got.keys() == dict(other.named_parameters()).keys()
    slimgrad.hf.disable(other)
    expected = other(**given).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss.item() != pytest.approx(model(**given).loss.item(), rel=1e-3)


def test_unwrapped_by_accelerate() -> None:
    given = {"input_ids": ROWS, "labels": LABELS}
    _, _, model = prepared(large(llama()).float(), given, "before")
    accelerate = pytest.importorskip("accelerate")
    unwrapped = accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    got = unwrapped(**given).loss
    assert sweeps(unwrapped) == 2
    slimgrad.hf.disable(unwrapped)
    assert got.item() == pytest.approx(unwrapped(**given).loss.item(), rel=1e-6)
