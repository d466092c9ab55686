"""Adapters: each kind that PEFT puts on a model, enabled before or after, against the same without; QLoRA in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import slimgrad.hf  # noqa: E402
from slimgrad.errors import InputError, ModelError  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402
from tests.contract.contract import global_error  # noqa: E402
from tests.hf.models import KINDS, enable, gradients, hybrid, large, llama, sweeps, taken, tokens, worst  # noqa: E402

EXACT = 1e-10  # measured: 9e-16 to 1e-13
IDS = tokens()
LAYERS = ["q_proj", "v_proj", "down_proj"]

ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear"),
    "lora on the head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "lora beside a trained head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
}


def adapted(config: Any, model: nn.Module | None = None) -> Any:
    """A model with an adapter that does something."""
    torch.manual_seed(0)
    found = peft.get_peft_model(large(llama()) if model is None else model, config).double().train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in found.parameters():
            if p.requires_grad:
                p.copy_(torch.empty_like(p).normal_(0, 0.15, generator=generator))
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str, when: str) -> None:
    loss, expected = gradients(adapted(ADAPTERS[adapter]()), input_ids=IDS, labels=IDS)
    if when == "before":
        model = adapted(ADAPTERS[adapter](), enable(large(llama())))
    else:
        model = enable(adapted(ADAPTERS[adapter]()))
    got_loss, got = gradients(model, input_ids=IDS, labels=IDS)
    assert sweeps(model.get_base_model()) == 1
    print(adapter, when, worst(got, expected))
    assert got_loss == pytest.approx(loss, rel=1e-12)
    assert worst(got, expected) <= EXACT
    slimgrad.hf.disable(model)
    assert worst(gradients(model, input_ids=IDS, labels=IDS)[1], expected) == 0


@pytest.mark.parametrize(("kind", "layers"), [("mamba2", ["in_proj"]), ("hybrid", "all-linear")])
def test_lora_on_other_kinds_with_right_padding_and_checkpointing(kind: str, layers: Any) -> None:
    mask = torch.arange(44) < torch.tensor([44, 29])[:, None]
    given = {"input_ids": IDS, "attention_mask": mask.long(), "labels": IDS.masked_fill(~mask, -100)}
    model = adapted(peft.LoraConfig(r=4, target_modules=layers), large(KINDS[kind]()))
    loss, expected = gradients(model, **given)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    got_loss, got = gradients(enable(model), **given)
    print(kind, worst(got, expected))
    assert sweeps(model.get_base_model()) == 1
    assert got_loss == pytest.approx(loss, rel=1e-12)
    assert worst(got, expected) <= EXACT


def test_the_adapter_that_a_forward_ran_with_is_the_one_of_its_backward() -> None:
    def run(model: Any) -> tuple[float, dict[str, Tensor]]:
        with widened():
            with model.disable_adapter():
                loss = model(input_ids=IDS, labels=IDS).loss
            (loss * model(input_ids=IDS, labels=IDS).loss).backward()
        return loss.item(), taken(model)

    config = peft.LoraConfig(r=4, target_modules=r".*layers.1.mlp.down_proj", modules_to_save=["lm_head"])
    expected = run(adapted(config))
    model = enable(adapted(config))
    got = run(model)
    assert sweeps(model.get_base_model()) >= 1
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert worst(got[1], expected[1]) <= EXACT


@pytest.mark.parametrize("when", ["before", "after"])
def test_prefix_tuning_is_refused(when: str) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = adapted(config, enable(large(llama()))) if when == "before" else enable(adapted(config))
    with pytest.raises(InputError, match=r"past_key_values was given in training \(prefix tuning does so\)"):
        model(input_ids=IDS, labels=IDS)
    assert not taken(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_that_count_tokens_are_refused(when: str) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], alora_invocation_tokens=[14, 14], task_type=peft.TaskType.CAUSAL_LM
    )
    if when == "before":
        model = adapted(config, enable(large(llama())))
        with pytest.raises(ModelError, match="is an activated LoRA"):
            model(input_ids=IDS, labels=IDS)
    else:
        model = adapted(config)
        with pytest.raises(ModelError, match="is an activated LoRA"):
            enable(model)


# What it costs: 4-bit weights are dequantised three times a chunk (both sweeps and the backward pass). On one CPU
# thread, 22.5M weights of two layers of width 1,024 take 6.9 ms once; that is 8.4, 4.6, 2.8 and 1.5 % of a chunk's time
# for chunks of 64, 128, 256 and 512 tokens.
# in whole blocks of 64 along every row, as bitsandbytes needs on a CPU
BLOCKS = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
HEADS = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}


def in_four_bits(model: Any, folder: Path, compute: torch.dtype) -> Any:
    """The model's weights quantised, and LoRA beside them."""
    model.float().save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    loaded = type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    prepared = peft.prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    found = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in found.parameters():
            if p.requires_grad:
                p.copy_(torch.empty(p.shape).normal_(0, 0.15, generator=generator))
    return found


def in_float64(model: Any) -> Any:
    """All but the 4-bit weights."""
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None and p.is_floating_point():
                module._parameters[name] = nn.Parameter(p.detach().double(), p.requires_grad)
        for name, x in [*module._buffers.items()]:
            if x is not None and x.is_floating_point():
                module._buffers[name] = x.double()
    return model


@pytest.fixture
def kernels_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own write nothing for float64; here its weights are dequantised as they are, and then widened."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def product(A: Tensor, B: Tensor, quant_state: Any, out: None = None, bias: Tensor | None = None) -> Tensor:
        with torch._C.DisableTorchFunction():  # whoever widens tensors that a kernel is to fill
            weight = bitsandbytes.functional.dequantize_4bit(B.view(-1, 1), quant_state)
        assert weight.dtype == torch.float32
        return nn.functional.linear(A, weight.to(A.dtype), bias)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", product)


@pytest.mark.usefixtures("kernels_in_float64")
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_qlora(kind: str, tmp_path: Path) -> None:
    sizes = BLOCKS if kind == "llama" else {**BLOCKS, **HEADS}
    model = in_float64(in_four_bits(large({"llama": llama, "hybrid": hybrid}[kind](**sizes)), tmp_path, torch.float64))
    weights = [p for p in model.parameters() if p.dtype == torch.uint8]
    before = [p.clone() for p in weights]
    assert len(weights) >= 14
    loss, expected = gradients(model, input_ids=IDS, labels=IDS)
    enable(model)
    got_loss, got = gradients(model, input_ids=IDS, labels=IDS)
    assert sweeps(model.get_base_model()) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    print(kind, worst(got, expected), len(got))
    assert got_loss == pytest.approx(loss, rel=1e-12)
    assert worst(got, expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_as_users_have_it(dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """With bitsandbytes' own kernels and reentrant checkpointing: no further from float64 than plain QLoRA."""
    pytest.importorskip("bitsandbytes")
    model, errors, found = in_four_bits(large(llama(**BLOCKS)), tmp_path, dtype), [], []
    for chunked in (False, True):
        if chunked:
            slimgrad.hf.enable(model, chunk=13)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append(taken(model))
    assert sweeps(model.get_base_model()) == 1
    request.getfixturevalue("kernels_in_float64")
    truth = in_float64(in_four_bits(large(llama(**BLOCKS)), tmp_path / "again", torch.float64))
    expected = gradients(truth, input_ids=IDS, labels=IDS)[1]
    errors = [global_error(one, expected) for one in found]
    print(dtype, errors)
    assert errors[1] <= 2 * errors[0]  # measured 1.13 in float32 (2.2e-6), 0.65 in bfloat16
