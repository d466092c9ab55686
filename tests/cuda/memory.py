"""Peak memory of a linear attention model over the length, on CUDA: `python -m tests.cuda.memory`."""

from __future__ import annotations

import sys
import time

import torch

import slimgrad as sg
from slimgrad.models import Performer, PerformerConfig


def peak_reserved(length: int, *, chunk: int = 2048, store: str = "device") -> int:
    """The most bytes that torch held of the device while one gradient was computed; tokens are in host memory."""
    torch.manual_seed(0)
    model = Performer(PerformerConfig(layers=2, width=256, heads=4)).to("cuda")
    tokens = torch.randint(0, 256, (1, length))
    schedule = sg.Rebuild(store=store, rows=store)
    sg.backward(model, tokens[:, : 2 * chunk], chunk=chunk, schedule=schedule)
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    sg.backward(model, tokens, chunk=chunk, schedule=schedule)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    for length in [int(x) for x in sys.argv[1:]] or [8_192, 65_536, 524_288]:
        begun = time.perf_counter()
        peak = peak_reserved(length)
        print(f"{length:>8} tokens: {peak / 2**20:7.1f} MiB reserved at most, {time.perf_counter() - begun:.2f} s")
