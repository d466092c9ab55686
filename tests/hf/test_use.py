"""What people do with an enabled model besides a training step: exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.errors import InputError, ModelError  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402
from tests.hf.models import (  # noqa: E402
    SHAPE,
    enable,
    gemma2,
    gradients,
    hybrid,
    large,
    llama,
    sweeps,
    tokens,
    window,
    worst,
)

EXACT = 1e-10  # measured: 8e-16 to 2e-14 (the hybrid)


def gemma3(**fields: Any) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**SHAPE, **fields}, head_dim=8, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def both(model: Any, **given: Any) -> float:
    """The error of the gradients with `enable` against without."""
    _, expected = gradients(model, **given)
    enable(model)
    _, got = gradients(model, **given)
    assert sweeps(model) == 1
    return worst(got, expected)


def moss() -> Any:
    """Its base hands positions on to a model within, among other keyword arguments."""
    config = transformers.MossTranscribeDiarizeConfig()
    kind = transformers.MossTranscribeDiarizeForConditionalGeneration
    return kind(type(config)(**slimgrad.hf.certifying.shrunk_fields(config, {})))


@pytest.mark.parametrize("make", [llama, window, hybrid, moss])
def test_positions_that_do_not_start_at_zero(make: Callable[[], Any]) -> None:
    model, ids = large(make()), tokens()
    at = torch.arange(44).expand(2, -1)
    given = {"input_ids": ids, "labels": ids}
    spaced = torch.arange(7, 51)[None].expand(2, -1)
    spaced = spaced + torch.tensor([[0], [9]])  # another offset per row
    error = both(model, **given, position_ids=spaced)
    print(make.__name__, error)
    assert error <= EXACT
    step = slimgrad.hf.forwards.enabled(model)[-1].step
    assert step.takes_positions
    found = []
    for where in (at, at.flip(1)):  # that they are read at all, where a model has rotations
        with torch.no_grad():
            found.append(step.original(input_ids=ids, position_ids=where, use_cache=False).last_hidden_state)
    assert not torch.allclose(*found)


def test_kinds_of_tokens_that_are_all_text_are_left_out() -> None:
    """Gemma-3's processor hands out zeros for text, ones for images, which see each other."""
    config = transformers.Gemma3Config()
    config = type(config)(**slimgrad.hf.certifying.shrunk_fields(config, {}))
    model = large(transformers.Gemma3ForConditionalGeneration(config))
    ids = tokens()
    zeros = torch.zeros_like(ids)
    error = both(model, input_ids=ids, labels=ids, token_type_ids=zeros)
    print(error)
    assert error <= EXACT
    zeros[0, 5:9] = 1
    with pytest.raises(InputError, match="was given token_type_ids, with which chunks would give other outputs"):
        gradients(model, input_ids=ids, labels=ids, token_type_ids=zeros)


def test_zeros_that_a_model_adds_an_embedding_for_are_not_left_out() -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, ids = large(transformers.GPT2LMHeadModel(config)).eval(), tokens()
    given = {"input_ids": ids, "labels": ids, "token_type_ids": torch.zeros_like(ids)}
    _, expected = gradients(model, **given)
    enable(model)
    with slimgrad.hf.evaluated_in_chunks(model):
        _, got = gradients(model, **given)
    assert sweeps(model) == 1
    assert worst(got, expected) <= EXACT
    assert slimgrad.hf.certify(model).silent_zeros == []


CHANGES: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "a wider window": (window, "sliding_window", 20),
    "no window": (window, "sliding_window", None),
    "kinds of layers": (gemma3, "layer_types", ["full_attention", "full_attention"]),
    "fewer layers": (llama, "num_hidden_layers", 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_that_is_changed_after_is_refused(change: str) -> None:
    make, name, value = CHANGES[change]
    model, ids = enable(large(make())), tokens()
    setattr(model.config, name, value)
    with pytest.raises(ModelError, match=f"configuration was changed since slimgrad.hf.enable \\({name} from"):
        model(input_ids=ids, labels=ids)


def test_what_trainers_change_in_a_configuration_is_not() -> None:
    model, ids = enable(large(llama())), tokens()
    model.config.use_cache, model.config.pad_token_id = False, 3
    model.config.attention_dropout = 0.0
    model.resize_token_embeddings(110)
    model.set_attn_implementation("eager")
    _, got = gradients(model, input_ids=ids, labels=ids)
    assert sweeps(model) == 1
    slimgrad.hf.disable(model)
    assert worst(got, gradients(model, input_ids=ids, labels=ids)[1]) <= EXACT


@pytest.mark.parametrize("width", [9, 100])  # the wider one is never full in the check's 64 tokens
def test_layers_that_disagree_with_their_configuration_are_refused(width: int) -> None:
    model = gemma3(sliding_window=width)
    model.config.sliding_window = 60
    with pytest.raises(ModelError, match=f"self_attn.sliding_window is {width}, while .* configuration gives 60"):
        slimgrad.hf.enable(model)


def test_a_base_that_is_replaced_is_refused() -> None:
    model, ids = enable(large(llama())), tokens()
    model.model = llama().double().model
    with pytest.raises(ModelError, match="model of LlamaForCausalLM was replaced since"):
        model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("make", [llama, gemma2])  # a linear head; one in pieces, which is the model's own forward
@pytest.mark.parametrize("where", ["a layer", "the base"])
def test_hooks_that_steer_hidden_states(make: Callable[[], Any], where: str) -> None:
    model, ids, added = large(make()), tokens(), torch.linspace(-1, 1, 32).double()

    def steer(module: Any, args: Any, output: Any) -> Any:
        if where == "a layer":
            return output + added * output.tanh()
        output.last_hidden_state = output.last_hidden_state + added * output.last_hidden_state.tanh()
        return output

    (model.model.layers[0] if where == "a layer" else model.model).register_forward_hook(steer)
    error = both(model, input_ids=ids, labels=ids)
    print(make.__name__, where, error)
    assert error <= EXACT


def test_logits_by_key_say_why_they_are_not_there() -> None:
    model, ids = enable(large(llama())), tokens()
    found = model(input_ids=ids, labels=ids)
    assert found["loss"] is found.loss is found[0]
    with pytest.raises(InputError, match="logits of a forward with labels are not kept in training"):
        found["logits"]  # as transformers' LabelSmoother asks


def test_chunks_of_one_token_are_refused() -> None:
    with pytest.raises(InputError, match="chunk=1: expected a whole number, at least 2"):
        slimgrad.hf.enable(llama(), chunk=1)


def test_gradients_that_are_asked_for() -> None:
    """torch.autograd.grad of some parameters, in place of backward."""
    model, ids = large(llama()), tokens()
    wanted = [p for name, p in model.named_parameters() if "q_proj" in name or "lm_head" in name]

    def asked() -> dict[str, Any]:
        with widened():
            return dict(enumerate(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, wanted)))

    expected = asked()
    enable(model)
    assert worst(asked(), expected) <= EXACT
    assert sweeps(model) == 1
    assert all(p.grad is None for p in model.parameters())


def test_a_hook_that_comes_later_and_looks_across_tokens_is_refused() -> None:
    model, ids = large(llama()), tokens()
    slimgrad.hf.enable(model, chunk=16)
    layer = model.model.layers[0]
    scaling = layer.register_forward_hook(lambda module, args, out: out * 1.01)  # steering, token by token
    model(input_ids=ids, labels=ids).loss.backward()
    scaling.remove()
    layer.register_forward_hook(lambda module, args, out: out + out.cumsum(1))
    with pytest.raises(ModelError, match="looks across tokens"):
        model(input_ids=ids, labels=ids)


def test_a_pass_with_gradients_in_eval_mode_says_that_it_is_whole() -> None:
    model, ids = large(llama()), tokens()
    slimgrad.hf.enable(model, chunk=16)
    model.eval()
    with pytest.warns(UserWarning, match=r"LlamaModel is in eval mode.*Call model\.train\(\) first"):
        model(input_ids=ids, labels=ids)
    model(input_ids=ids, labels=ids)  # once is enough
    assert sweeps(model) == 0
