"""Data parallelism: two processes, half of the batch each, `DistributedDataParallel(sg.Chunked(model))`.

    python examples/06_data_parallel.py

The wrapper goes around `sg.Chunked`, not around the model: then each parameter is synchronised once per step, after the
last chunk. The rows here have different numbers of targets, so each process passes `normalizer=total / world_size`:
the wrapper's mean over the processes is then the mean over all targets.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

WORLD, LENGTH, CHUNK = 2, 300, 64


def build() -> tuple[Performer, Tensor, Tensor]:
    """The same model in every process, and the whole batch."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=1, width=32, heads=2)).double()
    inputs = torch.randint(0, 256, (2 * WORLD, LENGTH))
    targets = torch.nn.functional.pad(inputs[:, 1:], (0, 1), value=-100)
    for row, length in enumerate((300, 120, 77, 203)):
        targets[row, length:] = -100
    return model, inputs, targets


def worker(rank: int, folder: str) -> None:
    """One process: its rows, one synchronised gradient."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    model, inputs, targets = build()
    mine = slice(rank * 2, rank * 2 + 2)
    total = (targets[mine] != -100).sum()
    dist.all_reduce(total)

    parallel = DistributedDataParallel(sg.Chunked(model, chunk=CHUNK))
    loss = parallel(inputs[mine], targets[mine], normalizer=float(total) / WORLD)
    loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    model, inputs, targets = build()
    result = sg.backward(model, inputs, targets, chunk=CHUNK)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]
    print(f"one process, {len(inputs)} rows: loss {float(result.loss):.4f} over {result.num_targets} targets")
    for rank, gradients in enumerate(found):
        pairs = [(gradients[name], p.grad) for name, p in model.named_parameters() if p.grad is not None]
        error = max(float((got - expected).norm() / expected.norm()) for got, expected in pairs)
        print(f"process {rank} of {WORLD}: its gradients differ from one process by at most {error:.1e}")
        assert error < 1e-11


if __name__ == "__main__":
    main()
