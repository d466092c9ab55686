"""Hugging Face models on a device: attention through its kernels, gradients in chunks, rows in host memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad as sg
from tests.cuda.device import DEVICE

transformers = pytest.importorskip("transformers")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]
COMMON = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200, "use_cache": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full attention": ("Llama", {**COMMON, "num_hidden_layers": 3, "intermediate_size": 96}),
    "window": ("Mistral", {**COMMON, "num_hidden_layers": 2, "intermediate_size": 96, "sliding_window": 37}),
    "mamba2": (
        "Mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}
        | {"vocab_size": 200, "chunk_size": 16},
    ),
    "gated delta": (
        "Qwen3_5Text",
        {**COMMON, "num_hidden_layers": 4, "intermediate_size": 96, "head_dim": 32, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
}


def build(name: str, dtype: torch.dtype) -> Any:
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    return model.to(device=DEVICE, dtype=dtype).train()


def gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    total = torch.stack([(found[n] - expected[n]).norm() for n in found]).norm()
    return float(total / torch.stack([g.norm() for g in expected.values()]).norm())


@pytest.mark.parametrize("past", [0, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_is_as_exact_as_torchs_own(past: int, dtype: torch.dtype) -> None:
    from slimgrad.hf.attention import attention

    torch.manual_seed(0)
    chunk, heads, key_heads, dim = 64, 6, 2, 32
    query = torch.randn(2, heads, chunk, dim, device=DEVICE, dtype=dtype)
    rows = [torch.randn(2, past + chunk, key_heads, dim, device=DEVICE, dtype=dtype) for _ in "kv"]
    weight = torch.randn(2, chunk, heads, dim, device=DEVICE, dtype=dtype)
    mask = torch.arange(past + chunk, device=DEVICE) <= torch.arange(past, past + chunk, device=DEVICE)[:, None]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(1, 2).repeat_interleave(heads // key_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(nn.Identity(), q, k.transpose(1, 2), v.transpose(1, 2), None)[0]

    def found(function: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in (query, *rows)]
        out = function(*given)
        return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), given)]

    truth = found(whole, torch.float64)
    for name, a, b, t in zip("okqv", found(ours, dtype), found(whole, dtype), truth, strict=True):
        mine, torchs = (float((x.double() - t).norm() / t.norm()) for x in (a, b))
        print(f"ATTENTION {dtype} past {past} {name}: {mine:.1e} against {torchs:.1e}")
        assert mine <= 2 * torchs + 1e-7, (name, mine, torchs)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_chunks_are_those_of_the_whole(name: str) -> None:
    tokens = torch.randint(3, 200, (2, 101), device=DEVICE)
    model = build(name, torch.float64)
    expected = gradients(model, tokens)
    sg.hf.enable(model, chunk=20)
    error = distance(gradients(model, tokens), expected)
    print(f"HF {name}: {error:.1e}")
    assert error < 1e-5  # casts to float32 inside; measured on a CPU: 1e-7


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_worse_than_plain(name: str) -> None:
    tokens = torch.randint(3, 200, (1, 150), device=DEVICE)
    truth = gradients(build(name, torch.bfloat16).float(), tokens)
    model = build(name, torch.bfloat16)
    plain = distance(gradients(model, tokens), truth)
    sg.hf.enable(model, chunk=64)
    ours = distance(gradients(model, tokens), truth)
    print(f"HF bf16 {name}: {ours:.1e} against plain {plain:.1e}")
    assert ours <= 2 * plain


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_in_host_memory_give_the_same(checkpointing: bool) -> None:
    tokens = torch.randint(3, 200, (1, 150), device=DEVICE)
    found: list[dict[str, Tensor]] = []
    for rows in ("device", "host"):
        model = build("full attention", torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sg.hf.enable(model, chunk=32, schedule=sg.Rebuild(rows=rows))
        found.append(gradients(model, tokens))
    assert distance(*found) < 1e-6


def test_a_step_of_the_optimiser_lowers_the_loss() -> None:
    tokens = torch.randint(3, 200, (1, 150), device=DEVICE)
    model = build("full attention", torch.bfloat16)
    sg.hf.enable(model, chunk=64)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
