"""Failed allocations are told apart from every other error, by class or by words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slimgrad.errors import MemoryLimitError
from slimgrad.sweep.allocation import is_allocation_failure, release

# Seen on Linux with torch 2.13 (CPU) as operations ran under RLIMIT_DATA or RLIMIT_AS, with 0 to 64 MB left.
SEEN = [
    # matmul, Linear, softmax, embedding, attention, convolutions, LSTM and GRU in four dtypes, each of their backward
    # passes, code that torch.compile made, a checkpoint's recomputation
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8388608 bytes. Error code 12 (Cannot allocate memory)",
    # first call at a shape: conv2d (32, 64, 3) in float32, 0 to 128 KiB left; Linear (512, 768) in bfloat16, 2.5 MiB
    "could not create a primitive",
    # first call of LSTM (64, 128) on 50 steps in float32, 18 to 23 MiB left
    "could not execute a primitive",
    # svd of 600 x 600 (LAPACK's workspace), unique, 50,000 generators, a depthwise conv1d in bfloat16
    "std::bad_alloc",
    "MKL FFT error: Intel oneMKL DFTI ERROR: Not enough memory to allocate",  # rfft of a length that is no round number
    "MKL error: SPARSE_STATUS_ALLOC_FAILED when calling `mkl_sparse_spmm( SPARSE_OPERATION_NON_TRANSPOSE, "
    "mkl_sparse_mat1.descriptor(), mkl_sparse_mat2.descriptor(), &result_desc)`",
    "unable to mmap 268435456 bytes from file </tmp/file>: Cannot allocate memory (12)",  # torch.from_file, torch.load
    "unable to mmap 16777216 bytes from file </torch_2816_1537_0>: Cannot allocate memory (12)",  # share_memory_
    # torch.empty of more bytes than 64 bits count: parts of a chunk may fit, and a command says that memory ran out
    "Storage size calculation overflowed with sizes=[1099511627776, 1073741824]",
]
# From bug reports: other systems and devices.
REPORTED = [
    "[enforce fail at C:\\work\\c10\\core\\impl\\alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you "
    "tried to allocate 1981808640 bytes.",
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com for more.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB).",
    "Invalid buffer size: 19.45 GiB",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "could not create a memory object",
    "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript:\n"
    "RuntimeError: could not create a primitive\n",
]
# No memory helps against these.
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
    RuntimeError(
        "could not create a primitive descriptor for the matmul primitive. Run workload with environment variable "
        "ONEDNN_VERBOSE=all to get additional diagnostic information."
    ),
    RuntimeError("could not create a memory descriptor from blob"),
    RuntimeError("unable to mmap 64 bytes from file </tmp/file>: Invalid argument (22)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    ValueError("not enough memory"),
    OSError(28, "No space left on device"),
    MemoryLimitError("out of memory: a smaller chunk needs less"),  # this library's own verdict, not an allocation
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("text", SEEN + REPORTED)
def test_known_texts_are_recognised(text: str) -> None:
    assert is_allocation_failure(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Failed to allocate a Tensor object"),  # seen as 100,000 small tensors were made
        MemoryError(),
        OSError(12, "Cannot allocate memory"),  # seen from numpy.memmap
        torch.AcceleratorError("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_known_classes_are_recognised(error: BaseException) -> None:
    assert is_allocation_failure(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not is_allocation_failure(error)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: torch.ones(1).expand(2**50).clone(),
        lambda: np.empty(2**60, dtype=np.uint8),
        lambda: bytearray(2**60),
    ],
    ids=["torch", "an operation", "numpy", "Python"],
)
def test_allocations_beyond_any_address_space(allocate) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert is_allocation_failure(caught.value)


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.ones(3, 4) @ torch.ones(5, 6),
        lambda: torch.empty(-1),
        lambda: torch.UntypedStorage(-5),  # "[enforce fail at alloc_cpu.cpp": the allocator's, but no lack of memory
        lambda: torch.nn.LSTM(4, 4)(torch.ones(2, 2, 5)),
        lambda: torch.ones(3, requires_grad=True).exp_(),
        lambda: torch.ones(2).sum().backward(),
        lambda: torch.nn.functional.embedding(torch.tensor([9]), torch.ones(3, 2)),
        lambda: torch.load("/nonexistent"),
        lambda: {}[0],
    ],
)
def test_errors_of_torch_that_are_something_else(fail) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    assert not is_allocation_failure(caught.value)


# Every operation runs once freely, then with less and more memory left, until it succeeds. Printed: what was raised.
UNDER_A_LIMIT = """
import json, os, resource, tempfile
import numpy as np, torch
from torch.utils.checkpoint import checkpoint
from slimgrad.sweep.allocation import is_allocation_failure

torch.set_num_threads(1)
MAX = resource.RLIM_INFINITY

def data_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, requires_grad=True)

def forward(module, *shape, dtype=torch.float32):
    module, x = module.to(dtype), ones(*shape, dtype=dtype)
    return lambda: module(x)

def backward(module, *shape, dtype=torch.float32):
    module, x = module.to(dtype), ones(*shape, dtype=dtype)
    y = module(x)
    y = y[0] if isinstance(y, tuple) else y
    return lambda: y.backward(torch.ones_like(y), retain_graph=True)

file = tempfile.NamedTemporaryFile()
file.truncate(1 << 26)
linear, x = torch.nn.Linear(512, 2048), ones(1024, 512)
recomputed = checkpoint(lambda x: linear(x).tanh(), x, use_reentrant=False)
indices, a, wave = torch.arange(20000), torch.ones(1024, 1024), torch.ones(8, (1 << 16) + 3)
embedding = torch.nn.Embedding(20000, 64)
embedded = embedding(indices)
bf16 = torch.bfloat16
operations = {
    "matmul": lambda: a @ a,
    "Linear": forward(torch.nn.Linear(512, 768), 2048, 512),
    "Linear, bfloat16": forward(torch.nn.Linear(512, 768), 2048, 512, dtype=bf16),
    "Linear backward": backward(torch.nn.Linear(512, 768), 2048, 512),
    "Linear backward, bfloat16": backward(torch.nn.Linear(512, 768), 2048, 512, dtype=bf16),
    "softmax backward": backward(torch.nn.Softmax(-1), 1024, 1024),
    "embedding backward": lambda: embedded.backward(torch.ones_like(embedded), retain_graph=True),
    "conv1d": forward(torch.nn.Conv1d(32, 64, 3), 4, 32, 8192),
    "LSTM": forward(torch.nn.LSTM(64, 128), 100, 32, 64),
    "LSTM backward": backward(torch.nn.LSTM(64, 128), 100, 32, 64),
    "LSTM, bfloat16": forward(torch.nn.LSTM(64, 128), 100, 32, 64, dtype=bf16),
    "checkpoint": lambda: recomputed.backward(torch.ones_like(recomputed), retain_graph=True),
    "rfft": lambda: torch.fft.rfft(wave),
    "small tensors": lambda: [torch.ones(8) for _ in range(50000)],
    "map": lambda: torch.from_file(file.name, shared=False, size=1 << 24),
    "numpy": lambda: np.ones(1 << 22),
    "numpy's map": lambda: np.memmap(file.name, mode="c"),
    "Python": lambda: [bytearray(1 << 16) for _ in range(1000)],
}

def tried(operation):
    operation()
    found = set()
    for left in [0, *(1 << power for power in range(16, 29, 2))]:
        failure, limit = None, data_bytes() + left
        resource.setrlimit(resource.RLIMIT_DATA, (limit, MAX))
        try:
            operation()
        except BaseException as error:
            failure = error.with_traceback(None)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX, MAX))
        if failure is None:
            break
        found.add((type(failure).__name__, str(failure), is_allocation_failure(failure)))
    operation()  # whoever is refused may ask again
    return sorted(found)

for name, operation in operations.items():
    child = os.fork()  # a heap of its own: one with large holes from others' refusals would refuse nothing
    if child == 0:
        print(json.dumps({name: tried(operation)}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data on Linux alone")
def test_whatever_is_raised_under_a_limit_is_recognised() -> None:
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # no second use of the heap
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True, env=os.environ | freed_at_once
    )
    assert done.returncode == 0, done.stderr
    kinds: set[str] = set()
    for name, found in (item for line in done.stdout.splitlines() for item in json.loads(line).items()):
        assert found, f"{name}: nothing was raised under a limit"
        for kind, text, recognised in found:
            assert recognised, f"{name}: {kind}: {text}"
            kinds.add(kind)
    assert kinds >= {"RuntimeError", "MemoryError", "OSError"}


def test_release_asks_the_devices_own_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(empty_cache=lambda: calls.append("xpu")))
    monkeypatch.setattr(torch, "hpu", SimpleNamespace(), raising=False)  # a backend that keeps nothing
    release(torch.device("cpu"))
    release(torch.device("hpu"))
    assert calls == []
    release(torch.device("xpu", 1))
    assert calls == ["xpu"]
