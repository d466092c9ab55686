"""An enabled model beside one step: copies, files, modes, frozen weights, other heads, dropout, checkpointing."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.errors import ConsumedError, ModelError  # noqa: E402
from slimgrad.hf.forwards import enabled, evaluated_in_chunks  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402
from tests.hf.models import (  # noqa: E402
    KINDS,
    enable,
    gradients,
    hybrid,
    large,
    llama,
    sweeps,
    taken,
    tokens,
    worst,
)

EXACT = 1e-10  # measured: 5e-16 to 2e-13
IDS = tokens()


def moved(model: nn.Module) -> None:
    """Other weights than those of the model that it is a copy of."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def plain(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """The same model's loss and gradients, disabled."""
    slimgrad.hf.disable(model)
    return gradients(model, input_ids=IDS, labels=IDS)


def file_of(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": file_of}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base_only", [False, True])
def test_a_copy_computes_with_its_own_weights(way: str, base_only: bool) -> None:
    model = enable(large(llama()))
    own = gradients(model, input_ids=IDS, labels=IDS)
    if base_only:  # a copy of the base, hooked inside: it belongs to another whole
        other = llama().double()
        other.lm_head = copy.deepcopy(model.lm_head)
        other.model = WAYS[way](model.model)
    else:
        other = WAYS[way](model)
    moved(other)
    loss, got = gradients(other, input_ids=IDS, labels=IDS)
    assert sweeps(other) == 2
    assert sweeps(model) == 1
    expected_loss, expected = plain(other)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert worst(got, expected) <= EXACT
    again = gradients(model, input_ids=IDS, labels=IDS)
    assert again[0] == own[0]
    assert worst(again[1], own[1]) == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = enable(large(llama()))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert not enabled(loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    expected = gradients(loaded.train(), input_ids=IDS, labels=IDS)
    got = gradients(model, input_ids=IDS, labels=IDS)
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert worst(got[1], expected[1]) <= EXACT


def test_disabled_is_as_it_was() -> None:
    model = llama()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    keys = {name: set(module.__dict__) for name, module in model.named_modules()}
    slimgrad.hf.enable(model)
    assert len(enabled(model)) == 2
    assert slimgrad.hf.disable(model) is model
    assert not enabled(model)
    for name, module in model.named_modules():
        assert set(module.__dict__) == keys[name], name
        for key, value in module.__dict__.items():
            assert value is before[name][key] or value == before[name][key], (name, key)


def test_wrapped_meanwhile_disabled_and_enabled_again() -> None:
    model = enable(large(llama()))
    inside = model.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:  # as TRL does
        return inside(*args, **kwargs)

    model.forward = wrapper
    gradients(model, input_ids=IDS, labels=IDS)
    assert sweeps(model) == 1
    slimgrad.hf.disable(model)
    assert model.forward is wrapper
    expected = gradients(model, input_ids=IDS, labels=IDS)
    for _ in range(2):
        enable(model)
        got = gradients(model, input_ids=IDS, labels=IDS)
        assert sweeps(model) == 1
        assert worst(got[1], expected[1]) <= EXACT
        slimgrad.hf.disable(model)
    assert worst(gradients(model, input_ids=IDS, labels=IDS)[1], expected[1]) == 0


def test_a_base_that_is_wrapped_already() -> None:
    model = llama()
    model.model.forward = model.model.forward
    with pytest.raises(ModelError, match=r"has a forward on its instance.*enable\(model\) before whoever wraps"):
        slimgrad.hf.enable(model)


@pytest.mark.parametrize("kind", ["llama", "mamba2", "hybrid"])
def test_evaluation_and_generation_have_the_same_bits(kind: str) -> None:
    model = large(KINDS[kind]()).float()
    prompt = IDS[:, :5]

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        found = [model.generate(input_ids=prompt, max_new_tokens=9, do_sample=True, pad_token_id=0)]
        with torch.no_grad():  # also in training
            outputs = model(input_ids=IDS, labels=IDS)
            found += [outputs.loss, outputs.logits]
        model.eval()
        found += [model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is in eval mode", UserWarning)
            outputs = model(input_ids=IDS, labels=IDS, output_hidden_states=True)  # with a graph
        outputs.loss.backward()
        found += [outputs.loss, outputs.logits, *outputs.hidden_states, *taken(model).values()]
        model.train()
        return found

    expected = run()
    slimgrad.hf.enable(model, chunk=13)
    got = run()
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert sweeps(model) == 0


def test_two_models_at_once() -> None:
    first, second = large(llama()), large(hybrid())
    expected = [gradients(one, input_ids=IDS, labels=IDS)[1] for one in (first, second)]
    enable(first)
    enable(second, chunk=7)
    with widened():
        (first(input_ids=IDS, labels=IDS).loss + second(input_ids=IDS, labels=IDS).loss).backward()
    assert worst(taken(first), expected[0]) <= EXACT
    assert worst(taken(second), expected[1]) <= EXACT


def test_gradients_add_up() -> None:
    model, others = large(llama()), [tokens(2, 40 + i, seed=i) for i in range(3)]

    def run() -> dict[str, Tensor]:
        with widened():
            for ids in others:
                (model(input_ids=ids, labels=ids).loss / 3).backward()
        return taken(model)

    expected = run()
    enable(model)
    assert worst(run(), expected) <= EXACT


def test_preferences_over_two_forwards() -> None:
    """Two passes, the second before the first one's backward; and a reference without gradients between."""
    model, chosen, rejected = large(llama()), tokens(2, 31, seed=4), tokens(2, 37, seed=5)

    def run() -> tuple[float, dict[str, Tensor]]:
        with widened():
            losses = [model(input_ids=ids, labels=ids).loss for ids in (chosen, rejected)]
            with torch.no_grad():
                reference = model(input_ids=rejected, labels=rejected).loss
            loss = -nn.functional.logsigmoid(3 * (losses[1] - losses[0] - 0.1 * reference))
            loss.backward()
        return loss.item(), taken(model)

    expected = run()
    enable(model)
    got = run()
    assert sweeps(model) == 2
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert worst(got[1], expected[1]) <= EXACT


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("head", ["linear", "pieces"])
@pytest.mark.parametrize("frozen", ["nothing", "the head", "the base"])
def test_a_second_backward_is_refused(frozen: str, head: str, retained: bool) -> None:
    model = large(llama())
    part = {"nothing": nn.Module(), "the head": model.lm_head, "the base": model.model}[frozen]
    part.requires_grad_(False)
    if head == "pieces":
        model.lm_head.register_forward_hook(lambda m, args, out: 2 * out)
    enable(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=retained)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    # without retain_graph torch itself says so, as in plain training
    with pytest.raises(ConsumedError if retained else RuntimeError, match="a second time"):
        loss.backward()
    assert all(torch.equal(p.grad, once[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_a_loss_that_is_kept_holds_nothing() -> None:
    model = enable(large(llama()))
    loss = model(input_ids=IDS, labels=IDS).loss
    node = loss.grad_fn
    while "LinearLoss" not in type(node).__name__:
        node = next(following for following, _ in node.next_functions if following is not None)
    loss.backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        _ = node.saved_tensors


def test_weights_that_change_before_the_backward() -> None:
    model = enable(large(llama()))
    loss = model(input_ids=IDS, labels=IDS).loss
    moved(model)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


FROZEN = {
    "layers": lambda name: ".layers.0." in name,
    "all but the head": lambda name: "lm_head" not in name,
    "all but one norm": lambda name: name != "model.layers.1.input_layernorm.weight",
    "the head": lambda name: "lm_head" in name,
    "embeddings": lambda name: "embed_tokens" in name,
}


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights(which: str, tied: bool) -> None:
    if tied and "head" in which:
        pytest.skip("a tied head is the embedding")
    model = large(llama(tie_word_embeddings=tied))
    for name, p in model.named_parameters():
        p.requires_grad_(not FROZEN[which](name))
    expected = gradients(model, input_ids=IDS, labels=IDS)
    enable(model)
    got = gradients(model, input_ids=IDS, labels=IDS)
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert worst(got[1], expected[1]) <= EXACT


def test_nothing_to_train() -> None:
    model = large(llama()).requires_grad_(False)
    expected = model(input_ids=IDS, labels=IDS).loss
    slimgrad.hf.enable(model, chunk=13)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


class Adapted(nn.Linear):
    """A head with something beside its weight, as PEFT puts around it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight, self.adapter = head.weight, nn.Linear(head.in_features, head.out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.adapter(input)


class Doubled(nn.Module):
    """A parametrisation of a head's weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("head", ["bias", "adapter", "hook", "backward hook", "parametrised", "forward of its own"])
def test_heads_that_are_not_the_class_own(head: str) -> None:
    model = llama()
    if head == "bias":
        model.lm_head.bias = nn.Parameter(torch.zeros(97))
    elif head == "adapter":
        model.lm_head = Adapted(model.lm_head)
    model = large(model)
    if head == "bias":
        nn.init.normal_(model.lm_head.bias)
    elif head == "hook":
        model.lm_head.register_forward_hook(lambda m, args, out: 2 * out)
    elif head == "backward hook":
        model.lm_head.register_full_backward_hook(lambda m, into, out: (2 * into[0],))
    elif head == "parametrised":
        nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    elif head == "forward of its own":
        model.lm_head.forward = lambda x: 2 * nn.functional.linear(x, model.lm_head.weight)
    expected = gradients(model, input_ids=IDS, labels=IDS)
    enable(model)
    got = gradients(model, input_ids=IDS, labels=IDS)
    assert sweeps(model) == 1
    assert got[0] == pytest.approx(expected[0], rel=1e-12)
    assert worst(got[1], expected[1]) <= EXACT


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["llama", "window", "mamba2", "hybrid", "gemma2"])
def test_checkpointing_of_transformers_inside_chunks(kind: str, reentrant: bool) -> None:
    model = enable(large(KINDS[kind]()))
    expected = gradients(model, input_ids=IDS, labels=IDS)
    runs: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    inside = next(m for m in layer.modules() if isinstance(m, nn.Linear))
    inside.register_forward_pre_hook(lambda *_: runs.append(1))
    gradients(model, input_ids=IDS, labels=IDS)
    without = len(runs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    hooks = model.get_input_embeddings()._forward_hooks
    before = list(hooks.items())
    runs.clear()
    got = gradients(model, input_ids=IDS, labels=IDS)
    print(kind, reentrant, worst(got[1], expected[1]), without, len(runs))
    assert len(runs) > without  # layers do run once more
    assert got[0] == expected[0]
    assert worst(got[1], expected[1]) <= (0 if kind == "llama" else EXACT)  # measured 0 for all
    assert list(hooks.items()) == before
    assert "make_inputs_require_grads" in {hook.__name__ for hook in hooks.values()}


def test_frozen_embeddings_that_are_made_leaves() -> None:
    """As PEFT and TRL do where adapters train below checkpointing; their hook's name is in the singular."""
    model = large(llama())
    model.get_input_embeddings().requires_grad_(False)

    def make_inputs_require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)
    expected = gradients(model, input_ids=IDS, labels=IDS)
    enable(model)
    got = gradients(model, input_ids=IDS, labels=IDS)
    assert sweeps(model) == 1
    assert worst(got[1], expected[1]) <= EXACT


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_is_drawn_from_the_seed(checkpointed: bool) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).train()
    slimgrad.hf.enable(model, chunk=13)
    if checkpointed:
        model.gradient_checkpointing_enable()

    def run(seed: int) -> tuple[float, dict[str, Tensor]]:
        torch.manual_seed(seed)
        loss = model(input_ids=IDS, labels=IDS).loss
        torch.manual_seed(99)  # what is drawn between does not matter
        loss.backward()
        return loss.item(), taken(model)

    first, second, other = run(1), run(1), run(2)
    assert first[0] == second[0] != other[0]
    assert all(torch.equal(second[1][name], g) for name, g in first[1].items())
    assert worst(other[1], first[1]) > 0.01


def test_evaluation_in_chunks() -> None:
    model = large(llama()).eval()
    with torch.no_grad(), widened():
        expected = model(input_ids=IDS, labels=IDS).loss
    enable(model)
    with torch.no_grad(), evaluated_in_chunks(model), widened():
        got = model(input_ids=IDS, labels=IDS)
    assert sweeps(model) == 1
    assert not hasattr(got, "logits")
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    assert not got.loss.requires_grad
