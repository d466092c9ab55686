"""The child's side: one method of one case, asked over a pipe, so that the children of a case can take turns.

A line of JSON comes in, a line goes out. What libraries print goes to standard error; a child that ends without an
answer has failed, and the last line there says why.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.joint.cases import COMPILED
from benchmarks.measure import IN_PLACE_FLOPS
from benchmarks.published import distance
from slimgrad.budget import available, process
from slimgrad.budget.live import LiveBytes
from slimgrad.budget.measure import measure_peak

aten = torch.ops.aten
# where the first factor stands
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}
LEAST_SECONDS = 0.01  # of a product that is timed


class Products(TorchDispatchMode):
    """The matrix products that are carried out: shapes and strides of both factors, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = PRODUCTS.get(func.overloadpacket)
        if first is not None:
            self.found[tuple((tuple(x.shape), x.stride()) for x in args[first : first + 2])] += 1
        return func(*args, **(kwargs or {}))


class Worker:
    """What can be asked of a child."""

    def __init__(self, task: dict[str, Any]) -> None:
        if task["method"]["kind"] == "products":
            return
        module, _, name = task["build"].partition(":")
        method, self.length = task["method"], task["length"]
        make = getattr(importlib.import_module(module), name)
        self.subject = make(method, self.length, task["double"], **task["sizes"])
        self.compiled = method["kind"] == COMPILED

    def peak(self) -> dict[str, Any]:
        """Resident bytes of the first whole gradient above those before, gradients of the parameters included."""
        self.subject.gradient(64, 8)  # what is loaded and filled once is not the gradient's
        self.subject.model.zero_grad(set_to_none=True)
        gc.collect()
        available.trim()
        found = measure_peak(lambda: self.subject.gradient(self.length, 0))
        return {"resident_bytes": found.peak_bytes}

    def truth(self, path: str, tokens: int) -> dict[str, Any]:
        """Write the gradient over the first tokens."""
        self.subject.gradient(tokens, 0)
        torch.save(self.subject.gradients(), path)
        return {}

    def check(self, path: str, tokens: int) -> dict[str, Any]:
        """How far the gradient is from the truth, over so many tokens: over all, that whose peak was measured."""
        if tokens != self.length:
            self.subject.gradient(tokens, 0)
        return {"error": distance(self.subject.gradients(), torch.load(path))}

    def count(self) -> dict[str, Any]:
        """Bytes of tensors at the peak, FLOPs, and which products; of compiled code nobody knows."""
        if self.compiled:
            return {"products": []}
        counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE_FLOPS)
        with counter, Products() as products, LiveBytes() as live:
            self.subject.gradient(self.length, 0)
        return {
            "live_bytes": live.peak, "flops": counter.get_total_flops(),
            "products": [[*key, times] for key, times in products.found.items()],
        }  # fmt: skip

    def go(self) -> dict[str, Any]:
        began = process_time()
        self.subject.gradient(self.length, 0)
        return {"seconds": process_time() - began}

    def multiply(self, products: list[Any]) -> dict[str, Any]:
        """Seconds that these products take by themselves, into memory that is there, and their FLOPs."""
        seconds = flops = 0.0
        for first, second, times in products:
            a, b = (_made(*shape) for shape in (first, second))
            taken = _seconds_of_product(a, b)
            seconds += times * taken
            flops += times * 2 * math.prod(a.shape) * b.shape[-1]
        return {"seconds": seconds, "flops": flops}


def _made(shape: list[int], strides: list[int]) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.full((size,), 0.5).as_strided(shape, strides)


def _seconds_of_product(a: Tensor, b: Tensor) -> float:
    out = torch.matmul(a, b)
    number, began = 0, process_time()
    while number == 0 or process_time() - began < LEAST_SECONDS:
        torch.matmul(a, b, out=out)
        number += 1
    return (process_time() - began) / number


def main() -> None:
    """Answer until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    process.limit_memory(task["memory"])
    torch.set_num_threads(1)
    worker = Worker(task)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(getattr(worker, question.pop("do"))(**question)), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    main()
