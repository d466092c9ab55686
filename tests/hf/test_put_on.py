"""What users, adapters and trainers put on a model: followed exactly, or refused by name, whenever it comes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import slimgrad.hf  # noqa: E402
from slimgrad.errors import InputError, ModelError  # noqa: E402
from slimgrad.hf.draws import ConstantDraws  # noqa: E402
from tests.hf.models import (  # noqa: E402
    SHAPE,
    enable,
    gemma2,
    gradients,
    large,
    llama,
    mamba2,
    mixtral,
    sweeps,
    taken,
    tokens,
    worst,
)

EXACT = 1e-10  # measured: at most 4e-15
pytestmark = pytest.mark.filterwarnings("ignore:the head of:UserWarning")
IDS = tokens()


def both(model: Any, put_on: Callable[[Any], object] = lambda model: None, **given: Any) -> float:
    """Put something on a model: the error of its gradients with `enable` against without."""
    put_on(model)
    expected = gradients(model, **given)
    enable(model)
    got = gradients(model, **given)
    assert sweeps(model) == 1
    assert got[0] == pytest.approx(expected[0], rel=1e-12, nan_ok=True)
    return worst(got[1], expected[1])


# --- targets ---


@pytest.mark.parametrize("make", [llama, gemma2])  # a linear head; one in pieces
@pytest.mark.parametrize("count", [None, 0])
def test_a_batch_without_a_target_has_no_gradient(make: Callable[[], Any], count: int | None) -> None:
    """One such batch among others that are accumulated leaves theirs."""
    none = {"labels": torch.full_like(IDS, -100)} | ({} if count is None else {"num_items_in_batch": torch.tensor(0)})
    model = enable(large(make()))
    loss, got = gradients(model, input_ids=IDS, **none)
    assert loss != loss  # as the model's own
    assert not any(g.any() or g.isnan().any() for g in got.values())
    both_there = gradients(model, input_ids=IDS, labels=IDS)[1].keys()
    assert got.keys() == both_there


# --- the head and the loss ---


class MixesIn(nn.Module):
    """A head that adds a share of the logits of the token before."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x)
        return logits + 0.5 * F.pad(logits[:, :-1], (0, 0, 1, 0))


class Penalised(transformers.LlamaForCausalLM):
    """A loss with a term that is off by default."""

    share = 0.0

    def forward(self, input_ids: Any = None, past_key_values: Any = None, labels: Any = None, **given: Any) -> Any:
        found = super().forward(input_ids=input_ids, past_key_values=past_key_values, labels=labels, **given)
        if self.share and labels is not None:
            found.loss = found.loss + self.share * found.logits.logsumexp(-1).pow(2).mean()
        return found


LONG = torch.randint(3, 97, (2, 600), generator=torch.Generator().manual_seed(1))  # more than one piece of a head


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["module", "hook"])
def test_a_head_that_looks_across_tokens_is_taken_whole(how: str, when: str) -> None:
    def put_on(model: Any) -> None:
        if how == "module":
            model.lm_head = MixesIn(model.lm_head)
        else:
            model.lm_head.register_forward_hook(lambda module, args, out: out - 0.3 * out.mean(1, keepdim=True))

    model = large(llama(max_position_embeddings=1024))
    if when == "before":
        error = both(model, put_on, input_ids=LONG, labels=LONG)
    else:
        slimgrad.hf.disable(enable(model, chunk=200))
        enable(model, chunk=200)
        gradients(model, input_ids=IDS, labels=IDS)
        put_on(model)
        got = gradients(model, input_ids=LONG, labels=LONG)[1]
        slimgrad.hf.disable(model)
        error = worst(got, gradients(model, input_ids=LONG, labels=LONG)[1])
    print(how, when, error)
    assert error <= EXACT


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_that_an_attribute_changes_is_the_model_s_own(when: str) -> None:
    model = large(Penalised(transformers.LlamaConfig(**SHAPE)))
    if when == "before":
        model.share = 0.1
    enable(model)
    plain = gradients(model, input_ids=IDS, labels=IDS)[0]
    model.share = 0.1
    loss, got = gradients(model, input_ids=IDS, labels=IDS)
    assert (loss > plain) == (when == "after")
    slimgrad.hf.disable(model)
    expected = gradients(model, input_ids=IDS, labels=IDS)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    assert worst(got, expected[1]) <= EXACT


@pytest.mark.parametrize("make", [llama, gemma2])
def test_what_is_trained_beside_the_head_gets_its_gradient(make: Callable[[], Any]) -> None:
    model, scale = large(make()), torch.full((97,), 0.1, dtype=torch.float64, requires_grad=True)
    model.lm_head.register_forward_hook(lambda module, args, out: out * (1 + scale))
    found = []
    for _ in range(2):
        gradients(model, input_ids=IDS, labels=IDS)
        found.append(scale.grad)
        scale.grad = None
        if len(found) == 1:
            enable(model)
    assert worst({"scale": found[1]}, {"scale": found[0]}) <= EXACT


def test_what_is_trained_beside_the_head_is_refused_in_pieces() -> None:
    model, scale = large(gemma2()), torch.full((97,), 0.1, dtype=torch.float64, requires_grad=True)
    model.lm_head.register_forward_hook(lambda module, args, out: out * (1 + scale))
    slimgrad.hf.enable(model, chunk=13, check=False)
    with pytest.raises(ModelError, match=r"shape \[97\] that requires a gradient and is no parameter of the model"):
        model(input_ids=IDS, labels=IDS)


# --- code in the place of transformers' ---


def _sharp(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **others: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, mask, scaling=0.3 * scaling, **others)


def test_attention_that_somebody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("sharp", _sharp)
    AttentionMaskInterface.register("sharp", sdpa_mask)
    given = {"input_ids": IDS, "labels": IDS}
    assert both(large(llama()), lambda model: model.set_attn_implementation("sharp"), **given) <= EXACT
    model = enable(large(llama()))
    model.set_attn_implementation("sharp")
    with pytest.raises(ModelError, match="attention function 'sharp' is none of transformers' own"):
        model(**given)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", _sharp)
    assert both(large(llama()), **given) <= EXACT


def test_a_certificate_is_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    slimgrad.hf.certify(llama())  # on disk
    own_loss, own_attention = modeling_llama.LlamaForCausalLM.forward, modeling_llama.LlamaAttention.forward

    def smoothed(
        self: Any, input_ids: Any = None, past_key_values: Any = None, labels: Any = None, **given: Any
    ) -> Any:
        found = own_loss(self, input_ids=input_ids, past_key_values=past_key_values, **given)
        if labels is not None:
            pair = found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            found.loss = F.cross_entropy(*pair, label_smoothing=0.2)
        return found

    def shifted(self: Any, *args: Any, **given: Any) -> Any:  # as LongLoRA's, in training only
        out, weights = own_attention(self, *args, **given)
        return out + (0.5 * out.cumsum(1) if self.training else 0), weights

    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama.LlamaForCausalLM, "forward", smoothed)
        assert both(large(llama()), input_ids=IDS, labels=IDS) <= EXACT
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama.LlamaAttention, "forward", shifted)
        with pytest.raises(ModelError, match="not certified as exact"):
            slimgrad.hf.enable(llama())
    assert slimgrad.hf.certify(llama()).is_exact


# --- layers and hooks ---


class Accumulates(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + 0.5 * x.cumsum(1)


def _replace(layer: Any) -> None:
    layer.mlp = Accumulates(layer.mlp)


def _wrap(layer: Any) -> None:
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: own(x) + 0.5 * x.cumsum(1)


def _hook_in_training(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, out: out + 0.3 * out.cumsum(1) if module.training else out)


def _noise(layer: Any) -> None:
    """As NEFTune's: by the length of what it sees."""

    def add(module: Any, args: Any, out: Tensor) -> Tensor:
        size = 5 / (out.shape[1] * out.shape[2]) ** 0.5
        return out + torch.zeros_like(out).uniform_(-size, size) if module.training else out

    layer.register_forward_hook(add)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("put_on", [_replace, _wrap, _hook_in_training, _noise])
def test_what_looks_across_tokens_is_refused(put_on: Callable[[Any], None], when: str, training: bool) -> None:
    model = large(llama()).train(training)
    if when == "after":
        slimgrad.hf.enable(model, chunk=13)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    put_on(model.model.layers[0])
    now = partial(slimgrad.hf.enable, model) if when == "before" else partial(model, input_ids=IDS, labels=IDS)
    with pytest.raises(ModelError, match="looks across tokens"):
        now()


def test_backward_hooks_are_refused_below_the_head() -> None:
    model = enable(large(llama()))
    hook = model.model.layers[0].mlp.register_full_backward_hook(lambda module, into, out: None)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp has a backward hook"):
        model(input_ids=IDS, labels=IDS)
    hook.remove()
    gradients(model, input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("use", ["a loss", "attention weights", "an input", "a target"])
def test_outputs_of_our_own_look_that_a_hook_kept(use: str) -> None:
    model, kept = enable(large(llama(attn_implementation="eager"))), list[Tensor]()
    layer = model.model.layers[0]
    if use == "attention weights":
        layer.self_attn.register_forward_hook(lambda module, args, out: kept.append(out[1]))
    elif use == "an input":  # which transformers passes by name
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, given: kept.append(given["hidden_states"]), with_kwargs=True
        )
    else:
        layer.register_forward_hook(lambda module, args, out: kept.append(out))
    loss = model(input_ids=IDS, labels=IDS).loss
    if use != "a target":
        with pytest.raises(ModelError, match="kept an output of slimgrad's own look"):
            (loss + kept[0].pow(2).mean()).backward()
    else:
        assert (loss + kept[0].detach().mean()).isnan()


# --- draws ---


def opt(**fields: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48}
    sizes |= {"max_position_embeddings": 256, "word_embed_proj_dim": 32, "pad_token_id": 0, "vocab_size": 97}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **fields))


def test_what_is_drawn_once_for_a_sequence_is_refused() -> None:
    enable(large(opt(dropout=0.1)))  # each layer draws whether it is dropped, which is never
    with pytest.raises(ModelError, match="draws something at random once for a whole sequence"):
        slimgrad.hf.enable(large(opt(layerdrop=0.5)))
    model = large(llama())
    for layer in model.model.layers:  # one mask for all tokens
        layer.register_forward_hook(lambda module, args, out: out * F.dropout(torch.ones_like(out[:, :1]), 0.1))
    with pytest.raises(ModelError, match="draws something at random once"):
        slimgrad.hf.enable(model)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own
def test_adapters_that_are_dropped_are_refused_before_they_have_learned() -> None:
    """LoHa begins with a difference of zero, which no drop changes."""
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(target_modules=["q_proj"], r=2, module_dropout=0.5, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="draws something at random once"):
        slimgrad.hf.enable(peft.get_peft_model(large(llama()), config))


def test_a_draw_of_another_kind_hides_none() -> None:
    model = large(opt(layerdrop=0.5))
    layer = model.model.decoder.layers[0].fc1
    layer.register_forward_hook(lambda module, args, out: out + torch.empty_like(out).exponential_() * 0)
    with pytest.raises(ModelError, match="draws something at random once"):
        slimgrad.hf.enable(model)


def test_dropout_per_token_is_not_taken_for_one_of_a_sequence() -> None:
    """Of widths that make 64 tokens of the one as many numbers as 18 of the other."""
    model = large(llama(hidden_size=36, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: F.dropout(out, 0.1))
        layer.mlp.up_proj.register_forward_hook(lambda module, args, out: F.dropout(out, 0.1))
    enable(model)


class Table(nn.Module):
    """A table in a plain attribute, which is returned as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(1, 67, 32, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.table


def test_what_modules_hold_is_left_alone() -> None:
    model = large(llama())
    model.model.layers[0].table = Table()
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + 0 * module.table(out).sum())
    model.model.layers[0].table.register_forward_hook(lambda module, args, out: None)
    enable(model)
    assert bool((model.model.layers[0].table.table == 1).all())


def test_a_head_is_taken_in_pieces_again() -> None:
    model = enable(large(llama()))
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))
    assert "logits" in model(input_ids=IDS, labels=IDS)
    hook.remove()
    assert "logits" not in model(input_ids=IDS, labels=IDS)


def test_a_look_leaves_nothing_that_cannot_be_copied() -> None:
    model = enable(large(llama()))
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: None)
    model(input_ids=IDS, labels=IDS)
    hook.remove()
    again = pickle.loads(pickle.dumps(model))
    assert gradients(again, input_ids=IDS, labels=IDS)[0] == gradients(model, input_ids=IDS, labels=IDS)[0]


def test_padded_positions_may_be_anything() -> None:
    model, mask = enable(large(llama())), torch.ones_like(IDS)
    mask[:, 40:] = 0
    at = torch.arange(44).expand(2, -1).masked_fill(mask == 0, 200)
    labels = IDS.masked_fill(mask == 0, -100)
    assert model(input_ids=IDS, labels=labels, attention_mask=mask, position_ids=at).loss.isfinite()


def test_draws_that_are_constant() -> None:
    x = torch.randn(3, 5)
    with ConstantDraws() as draws:
        assert torch.equal(F.dropout(x, 0.3), x)
        assert torch.equal(torch.rand_like(x), torch.rand_like(x))
        assert torch.empty(4).uniform_(-1, 3).tolist() == [2.0] * 4
    assert draws.seen["rand_like", 15] == 2
    assert draws.seen["uniform_", 4] == 1
    assert not draws.others
    with ConstantDraws() as draws:
        torch.multinomial(torch.ones(5), 2)
    assert draws.others


# --- caches, positions, documents ---


@pytest.mark.parametrize("labels", [IDS, None])
def test_a_cache_to_go_on_from_is_refused(labels: Tensor | None) -> None:
    model = enable(large(llama()))
    for whole in (model, model.model):
        with pytest.raises(InputError, match="returns no cache"):
            whole(input_ids=IDS, use_cache=True)
    past = model(input_ids=IDS, labels=labels).past_key_values
    with pytest.raises(InputError, match="past_key_values was given"):
        model(input_ids=IDS, labels=labels, past_key_values=past)
    with pytest.raises(InputError, match="returns no cache"):
        past.get_seq_length()
    assert model(input_ids=IDS, labels=labels, use_cache=False).past_key_values is None


def test_positions_that_say_two_things_are_refused() -> None:
    model = enable(large(llama()))
    jump = torch.cat([torch.arange(20), torch.arange(100, 124)]).expand(2, -1)
    with pytest.raises(InputError, match="jump forward within a row"):
        model(input_ids=IDS, labels=IDS, position_ids=jump)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = enable(large(llama(max_position_embeddings=24, rope_parameters=rope)))
    model(input_ids=IDS, labels=IDS, position_ids=torch.arange(44).expand(2, -1))
    with pytest.raises(InputError, match="position_ids begin at 10"):
        model(input_ids=IDS, labels=IDS, position_ids=torch.arange(10, 54).expand(2, -1))


@pytest.mark.parametrize("labelled", [True, False])
def test_packed_rows_of_a_model_that_ignores_positions(labelled: bool) -> None:
    """Each document alone, whoever computes the loss: Mamba-2's causal forward does not hand positions to its base."""
    ids, labels = IDS[:1, :33], IDS[:1, :33].clone()
    labels[:, [0, 14]] = -100
    at = torch.cat([torch.arange(14), torch.arange(19)])[None]

    def own(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum") / 31

    model = large(mamba2())
    sum(own(model(input_ids=ids[:, a:b]).logits, labels[:, a:b]) for a, b in ((0, 14), (14, 33))).backward()
    expected = taken(model)
    slimgrad.hf.enable(model, chunk=13)
    found = model(input_ids=ids, position_ids=at, labels=labels if labelled else None)
    (found.loss if labelled else own(found.logits, labels)).backward()
    error = worst(taken(model), expected)
    print(labelled, error)
    assert error <= 1e-6  # with the model's own casts to float32; measured 2e-7


# --- models that change themselves ---


def test_rwkv_is_rescaled_when_its_mode_changes() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "attention_hidden_size": 32, "intermediate_size": 48}
    config = transformers.RwkvConfig(vocab_size=97, context_length=256, rescale_every=3, **sizes)
    model = large(transformers.RwkvForCausalLM(config))
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = gradients(model, input_ids=IDS, labels=IDS)[1]
    enable(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for _ in range(2):
        assert worst(gradients(model, input_ids=IDS, labels=IDS)[1], expected) <= EXACT
        with torch.no_grad():
            model.eval()(input_ids=IDS)
        model.train()


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, of its own patterns
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_experts(when: str) -> None:
    """PEFT adapts their weights by a parametrization that it registers in every forward."""
    peft = pytest.importorskip("peft")
    model = mixtral()
    if when == "after":
        enable(model)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any("experts" in name for name, p in adapted.named_parameters() if p.requires_grad)
    adapted = large(adapted)
    if when == "before":
        enable(adapted)
    got = gradients(adapted, input_ids=IDS, labels=IDS)
    assert sweeps(adapted) == 1
    slimgrad.hf.disable(adapted)
    expected = gradients(adapted, input_ids=IDS, labels=IDS)
    error = worst(got[1], expected[1])
    print(when, error)
    assert error <= EXACT
