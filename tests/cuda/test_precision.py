"""Narrow numbers on the device: autocast, 16-bit weights, TF32, attention's kernels, and kept states as operands.

Each is as good as plain backpropagation in the same numbers, measured against plain backpropagation in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import slimgrad as sg
from tests.contract import contract
from tests.contract.cases import tokens
from tests.cuda.device import DEVICE, IS_CUDA, MODELS, PLACES, SCHEDULES, on_cuda_only, on_device
from tests.cuda.device import moved as on_it

NARROW = [torch.bfloat16, torch.float16]


def cast(x: Any, dtype: torch.dtype) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, x)


def errors(model: nn.Module, inputs: Any, targets: Any, way: str, **options: Any) -> tuple[float, float, float]:
    """Of chunked, of plain and of Algorithm 1 with the same chunks: relative, all gradients together."""
    with torch.autocast(DEVICE.type, enabled=False):
        exact = copy.deepcopy(model).double()
        truth = contract.without_state(contract.plain(exact, cast(inputs, torch.float64), targets))[1]
    found = [
        contract.chunked(way, model, inputs, targets, **options),
        contract.plain(model, inputs, targets),
        contract.specified(model, inputs, targets, chunk=options["chunk"]),
    ]
    return tuple(contract.global_error(contract.without_state(one)[1], truth) for one in found)


def require_as_good(found: tuple[float, float, float], what: str = "") -> None:
    """Both errors are rounding noise of one size, so that either may be the larger: see the contract's own test."""
    chunked, plain, same_cut = found
    print(f"{what}: chunked {chunked:.2e}, plain {plain:.2e}, Algorithm 1 {same_cut:.2e}")
    assert chunked <= 2 * max(plain, same_cut), (what, found)


@pytest.mark.parametrize("name", ["gated", "cached", "all kinds", "linear attention", "signals", "window", "performer"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_autocast(name: str, dtype: torch.dtype, way: str) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    model, inputs = model.float(), cast(inputs, torch.float32)
    with torch.autocast(DEVICE.type, dtype):
        for schedule in (sg.Rebuild(), sg.Binomial(3)):
            require_as_good(errors(model, inputs, targets, way, chunk=16, schedule=schedule), f"{name} {schedule}")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_backward_outside_of_the_autocast_of_its_loss(dtype: torch.dtype) -> None:
    model, inputs, _ = on_device(MODELS["all kinds"])()
    model = model.float()
    found = []
    for inside in (True, False):
        with torch.autocast(DEVICE.type, dtype):
            loss = sg.loss(model, inputs, chunk=16)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(contract.collect(model, None, None))
    error, name = contract.worst_error(found[0], found[1])
    assert error <= 1e-5, (name, error)  # the same kernels; float32 sums of gradients may add in another order


def test_a_scaled_loss() -> None:
    model, inputs, targets = on_device(MODELS["all kinds"])()
    truth = contract.without_state(contract.plain(model, inputs, targets))[1]
    model = model.float()
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.autocast(DEVICE.type, torch.float16):
        loss = sg.loss(model, inputs, targets, chunk=16)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    found = contract.global_error(contract.collect(model, None, None), truth)
    with torch.autocast(DEVICE.type, torch.float16):
        plain = contract.without_state(contract.plain(model, inputs, targets))[1]
    assert found <= 2 * contract.global_error(plain, truth)


@pytest.mark.parametrize("name", ["gated", "cached", "all kinds", "linear attention", "signals", "window", "performer"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_weights(name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    model, inputs = model.to(dtype), cast(inputs, dtype)
    for schedule in SCHEDULES:
        found = errors(model, inputs, targets, "backward", chunk=16, schedule=SCHEDULES[schedule]())
        require_as_good(found, f"{name} {schedule}")


@contextmanager
def tf32() -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", [nullcontext, tf32], ids=["float32", "TF32"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "growing sums"])
@pytest.mark.parametrize("schedule", ["Rebuild", "Binomial"])
def test_float32(name: str, schedule: str, precision: Any) -> None:
    model, inputs, targets = on_device(MODELS[name])()
    model, inputs = model.float(), cast(inputs, torch.float32)
    with precision():
        for way in ("backward", "loss"):
            found = errors(model, inputs, targets, way, chunk=16, schedule=SCHEDULES[schedule]())
            require_as_good(found, f"{name} {way}")


class Elman(nn.Module):
    """A state that is an operand of matrix products: where it was kept must not choose another kernel for them."""

    def __init__(self, width: int, leaves: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, width), nn.Linear(width, 13)
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(leaves))
        self.width = width

    def initial_state(self, batch_size: int) -> Any:
        return [self.head.weight.new_zeros(batch_size, self.width) for _ in self.mix]

    def forward(self, inputs: Tensor, state: Any) -> Any:
        x = self.embed(inputs)
        following = []
        for mix, h in zip(self.mix, state, strict=True):
            y = torch.tanh(mix(h)[:, None] + x)
            following.append(torch.tanh(F.linear(h, mix.weight) + y.mean(1)))
            x = y
        return self.head(x), following


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("width", [8, 24, 72, 136, 520, 1032])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_kept_state_is_as_good_an_operand_as_the_first_one(
    batch: int, width: int, dtype: torch.dtype, store: str
) -> None:
    torch.manual_seed(1)
    model = Elman(width).to(DEVICE, dtype)
    inputs = torch.randint(0, 13, (batch, 40), device=DEVICE)
    for schedule in (sg.Keep(store=store), sg.Binomial(2, store=store)):
        sg.backward(model, inputs, chunk=4, schedule=schedule)
        if dtype == torch.float64:
            found = contract.collect(model, None, None)
            with torch.enable_grad():
                state, losses = model.initial_state(batch), []
                for start in range(0, 40, 4):
                    outputs, state = model(inputs[:, start : start + 4], state)
                    following = contract.explicit(inputs, None)[:, start : start + 4]
                    losses.append(
                        F.cross_entropy(outputs.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="sum")
                    )
                (torch.stack(losses).sum() / (39 * batch)).backward()
            error, name = contract.worst_error(found, contract.collect(model, None, None))
            assert error <= 1e-12, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("width", [16, 48, 80])
def test_rows_in_a_buffer_that_grows_give_the_same_products(width: int, dtype: torch.dtype) -> None:
    """Strides of the buffer differ between the sweeps; its rows are operands of matrix products."""
    from tests.toy_models import AllKinds, CachedAttention

    for model_type in (CachedAttention, AllKinds):
        torch.manual_seed(1)
        model = model_type(width=width).to(DEVICE, dtype)
        for length, chunk in ((131, 9), (600, 50)):
            inputs = torch.randint(0, 13, (2, length), device=DEVICE)
            for rows in ("device", "host"):
                sg.loss(model, inputs, chunk=chunk, schedule=sg.Binomial(3, rows=rows)).backward()
            model.zero_grad()


class Blocks(nn.Module):
    """Attention within blocks of tokens, by one named kernel; what it found is summed up as the state."""

    block = 32

    def __init__(self, backend: SDPBackend | None, width: int = 64) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(13, width), nn.Linear(width, 3 * width), nn.Linear(width, 13)
        self.backend, self.width = backend, width

    def initial_state(self, batch_size: int) -> Any:
        wide = torch.promote_types(self.head.weight.dtype, torch.float32)
        return sg.PrefixSum(torch.zeros(batch_size, self.width, dtype=wide, device=DEVICE))

    def forward(self, inputs: Tensor, state: sg.PrefixSum) -> Any:
        x = self.embed(inputs)
        q, k, v = (
            y.unflatten(1, (-1, self.block)).unflatten(-1, (4, -1)).transpose(2, 3).flatten(0, 1)
            for y in self.qkv(x).chunk(3, -1)
        )
        with nullcontext() if self.backend is None or not IS_CUDA else sdpa_kernel(self.backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).flatten(2).reshape(x.shape)
        within = y.to(state.dtype).cumsum(1)
        before, following = state.advance(within[:, -1])
        return self.head(x + y + ((before[:, None] + within) / 256).to(x.dtype)), following


BACKENDS = [
    (SDPBackend.MATH, torch.float64),
    (SDPBackend.MATH, torch.bfloat16),
    (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16),
    (SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    (SDPBackend.FLASH_ATTENTION, torch.float16),
    (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
def test_attention_kernels(backend: SDPBackend, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model, inputs = Blocks(backend).to(DEVICE, dtype), torch.randint(0, 13, (2, 256), device=DEVICE)
    exact = Blocks(None).to(DEVICE, torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = contract.without_state(contract.plain(exact, inputs, None))[1]
    plain = contract.global_error(contract.without_state(contract.plain(model, inputs, None))[1], truth)
    for schedule in (sg.Rebuild(), sg.Binomial(2)):
        for way in ("backward", "loss"):
            found = contract.chunked(way, model, inputs, None, chunk=64, schedule=schedule)
            error = contract.global_error(contract.without_state(found)[1], truth)
            print(f"{backend} {dtype} {way}: chunked {error:.2e}, plain {plain:.2e}")
            assert error <= (contract.TOLERANCE if dtype == torch.float64 else 2 * plain)


@on_cuda_only
def test_a_convolution_whose_kernel_is_chosen_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's benchmark mode may choose another kernel in another thread: exact, or refused by name."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for way in ("backward", "loss"):
        try:
            contract.check(on_device(MODELS["all kinds"]), chunk=16, way=way)
        except sg.StateMismatchError as error:
            print(f"refused: {error}")


@pytest.mark.parametrize("name", ["gated", "cached", "all kinds", "linear attention", "signals", "window", "performer"])
def test_under_deterministic_algorithms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for way in ("backward", "loss"):
            contract.check(on_device(MODELS[name]), chunk=16, way=way)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_long_sequence_of_tokens_of_one_kind() -> None:
    """Thousands of gradients meet in one row of an embedding."""
    model, _, _ = on_device(MODELS["linear attention"])()
    inputs = on_it(tokens(4096) % 2)
    contract.require_close(
        contract.without_state(contract.chunked("backward", model, inputs, None, chunk=512)),
        contract.without_state(contract.plain(model, inputs, None)),
    )
