"""One sequence over two processes: each has half of the tokens; only a state and its gradient travel.

    python examples/05_segments_in_two_processes.py

    process 0:  forward over its half   --- the state after it ------>  process 1:  forward over its half,
    process 0:  back over its half      <-- gradient of that state ---  process 1:  back over its half

What travels has the size of the model's state, whatever the length of the halves, and no half is swept twice: a
`Segment` keeps what its way back needs while it waits for the other. The gradients are summed as in data parallelism.
More processes need no other code. They could as well be machines, or days: a `Segment` can be saved at any moment.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig

LENGTH, CHUNK = 1000, 64
PARTS = [slice(0, 430), slice(430, LENGTH)]


def build() -> tuple[Performer, Tensor, Tensor]:
    """The same model everywhere, and the sequence, of which each process takes its part."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=32, heads=2)).double()
    tokens = torch.randint(0, 256, (1, LENGTH))
    # Targets are written out, so that the last token of the first half still predicts the first of the second.
    return model, tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), len(PARTS))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(PARTS))
    is_first, is_last = rank == 0, rank == len(PARTS) - 1
    model, tokens, targets = build()
    swept: Counter[str] = Counter()

    state = None if is_first else sg.receive_state(rank - 1)
    segment = sg.Segment(
        model,
        tokens[:, PARTS[rank]],
        targets[:, PARTS[rank]],
        chunk=CHUNK,
        state=state,
        on_chunk=lambda event: swept.update([event.phase]),
    )
    state = segment.forward()
    sent = 0 if is_last else sg.send_state(state, rank + 1)

    gradient = None if is_last else sg.receive_state(rank + 1)
    result = segment.reverse(1 / (LENGTH - 1), gradient)  # one over the number of targets of the whole sequence
    sent += 0 if is_first else sg.send_state(result.initial_state_grad, rank - 1)

    for x in (result.loss, *(p.grad for p in model.parameters())):
        dist.reduce(x, 0)
    chunks = f"{swept['forward']} chunks forward, {swept['reverse']} back"
    print(f"process {rank}: {chunks}; {sent:,} bytes sent", flush=True)
    if is_first:
        compare(model, result.loss)
    dist.destroy_process_group()


def compare(model: Performer, loss: Tensor) -> None:
    """With one process that has all of the sequence."""
    alone, tokens, targets = build()
    whole = sg.backward(alone, tokens, targets, chunk=CHUNK)
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
    error = max(float((got - expected).norm() / expected.norm()) for got, expected in pairs)
    print(f"loss in two parts {float(loss):.6f}, whole {float(whole.loss):.6f}")
    print(f"two processes against one: gradients differ by at most {error:.1e}")
    assert error < 1e-12


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(len(PARTS))]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert all(process.exitcode == 0 for process in processes)


if __name__ == "__main__":
    main()
