"""The published code's weights compute here what they compute there.

The published model is written down once more, below: its names and shapes, and its forward pass over a whole sequence
with every sum laid out over time. What is converted is compared with that, in float64.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import published as benchmark
from torch import Tensor

import slimgrad as sg
from slimgrad import InputError
from slimgrad.budget.measure import call_in_child
from slimgrad.bytelm.model_file import describe_shape, read_model
from slimgrad.models import SHAPES, Performer, PerformerConfig, from_published, read_published, to_published
from slimgrad.models.published import published_arguments, published_names
from slimgrad.runs.tensors import model_tensors, save_tensors

LAYERS, WIDTH, HEADS, FEEDFORWARD, VOCABULARY = 2, 24, 3, 40, 11
CHUNK = 7
TIME = 3 * CHUNK + 1
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqr": lambda x: x * x,
    "relu": lambda x: x.clamp_min(0),
    "elu+1": lambda x: torch.where(x > 0, x + 1, x.exp()),
}


def published_weights(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights under the published names, in another order than ours; no norm is the identity."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)

    weights = {"input_map.weight": draw(VOCABULARY, WIDTH // 2)}
    for name, rows, columns in (
        ("attention.q_map", WIDTH, WIDTH),
        ("attention.k_map", WIDTH, WIDTH),
        ("attention.v_map", WIDTH, WIDTH),
        ("U_map", FEEDFORWARD, WIDTH),
        ("V_map", WIDTH, FEEDFORWARD),
    ):
        for layer in range(LAYERS):
            weights[f"layers.{layer}.{name}.weight"] = draw(rows, columns)
            weights[f"layers.{layer}.{name}.bias"] = draw(rows)
    for name in ("layernorm1", "layernorm2"):
        for layer in range(LAYERS):
            weights[f"layers.{layer}.{name}.weight"] = 1 + draw(WIDTH)
            weights[f"layers.{layer}.{name}.bias"] = draw(WIDTH)
    return weights | {"output_logit_map.bias": draw(VOCABULARY), "output_logit_map.weight": draw(VOCABULARY, WIDTH)}


def published_logits(
    weights: dict[str, Tensor], tokens: Tensor, *, feature_type: str, on_gptln: bool, heads: int = HEADS
) -> Tensor:
    """[batch, time] -> [batch, time, vocabulary]: the mathematics of the published full forward pass."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (linear(f"{name}.{map_}", x).unflatten(-1, (heads, -1)) for map_ in ("q_map", "k_map", "v_map"))
        q, k = FEATURES[feature_type](q), FEATURES[feature_type](k)
        sums = (k[..., :, None] * v[..., None, :]).cumsum(1)  # [batch, time, heads, features, head width]
        numerator = (sums * q[..., :, None]).sum(-2)
        denominator = (k.cumsum(1) * q).sum(-1, keepdim=True)
        return (numerator / (denominator + 1e-16)).flatten(2)

    def feed_forward(name: str, x: Tensor) -> Tensor:
        wide = linear(f"{name}.U_map", x)
        return linear(f"{name}.V_map", wide * (1 + torch.erf(wide / math.sqrt(2))) / 2)

    half = weights["input_map.weight"].shape[1]
    rates = torch.tensor([10_000 ** (-i / half) for i in range(0, half, 2)], dtype=torch.float64)
    angles = torch.arange(tokens.shape[1])[:, None] * rates
    code = torch.cat([angles.sin(), angles.cos()], 1).expand(len(tokens), -1, -1)
    x = torch.cat([weights["input_map.weight"][tokens], code], 2)
    for layer in range(LAYERS):
        for part, its_norm in ((attention, "layernorm1"), (feed_forward, "layernorm2")):
            name = f"layers.{layer}" + (".attention" if part is attention else "")
            its_norm = f"layers.{layer}.{its_norm}"
            x = x + (norm(its_norm, part(name, x)) if on_gptln else part(name, norm(its_norm, x)))
    return linear("output_logit_map", x)


def published_gradient(weights: dict[str, Tensor], tokens: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Of the mean cross-entropy of each next token, by the published names."""
    takers = {name: value.clone().requires_grad_() for name, value in weights.items()}
    logits = published_logits(takers, tokens[:, :-1], **arguments)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return dict(zip(takers, torch.autograd.grad(loss, list(takers.values())), strict=True))


def our_gradient(model: Performer, tokens: Tensor) -> dict[str, Tensor]:
    """The same, in chunks, by the published names."""
    sg.backward(model, tokens[:, :-1], tokens[:, 1:], chunk=CHUNK)
    return published_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def farthest(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, of that gradient's size."""
    assert found.keys() == truth.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in truth.items())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, TIME + 1))


@pytest.mark.parametrize("on_gptln", [True, False])
@pytest.mark.parametrize("feature_type", FEATURES)
def test_the_same_logits_and_the_same_gradient(feature_type: str, on_gptln: bool, tokens: Tensor) -> None:
    weights = published_weights()
    model = from_published(weights, heads=HEADS, feature_type=feature_type, on_gptln=on_gptln)
    expected = published_logits(weights, tokens, feature_type=feature_type, on_gptln=on_gptln)
    with torch.no_grad():
        logits, _ = model(tokens, model.initial_state(2))
    assert float((logits - expected).norm() / expected.norm()) < 2e-15  # measured: 5e-16
    expected = published_gradient(weights, tokens, feature_type=feature_type, on_gptln=on_gptln)
    assert farthest(our_gradient(model, tokens), expected) < 1e-13  # measured: 3e-14


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def swap(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {one: other, other: one}
        parts = {name: name.split(".")[-2] for name in weights}
        return {name: weights[name.replace(part, names.get(part, part))] for name, part in parts.items()}

    return swap


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        (swapped("q_map", "k_map"), {}),
        (swapped("k_map", "v_map"), {}),
        (swapped("layernorm1", "layernorm2"), {}),
        (dict, {"heads": 2}),
        (dict, {"feature_type": "relu"}),
        (dict, {"on_gptln": False}),
    ],
    ids=["query and key", "key and value", "norms", "heads", "features", "place of the norm"],
)
def test_a_wrong_conversion_would_show(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], arguments: dict[str, Any], tokens: Tensor
) -> None:
    weights = published_weights()
    model = from_published(change(weights), **({"heads": HEADS, "feature_type": "sqr", "on_gptln": True} | arguments))
    expected = published_gradient(weights, tokens, feature_type="sqr", on_gptln=True)
    assert farthest(our_gradient(model, tokens), expected) > 0.1  # measured: from 0.9 on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_in_bits(dtype: torch.dtype) -> None:
    weights = published_weights(dtype)
    drawn = torch.get_rng_state()
    model = from_published(weights, heads=HEADS)
    assert torch.equal(torch.get_rng_state(), drawn)
    config = PerformerConfig(
        layers=LAYERS, width=WIDTH, heads=HEADS, feedforward=FEEDFORWARD, vocabulary=VOCABULARY, norm="output"
    )
    assert model.config == config
    back = to_published(model)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], value)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(back[name], value) and value.any() for name, value in weights.items()), "memory is shared"


@pytest.mark.parametrize("name", ["I", "II", "III", "copying"])
def test_every_shape_of_the_paper_exists_there(name: str) -> None:
    config = SHAPES[name]
    with torch.device("meta"):
        weights = to_published(Performer(config))
    arguments = published_arguments(config)
    assert (arguments["hidden_dim"], arguments["n_layers"]) == (config.width, config.layers)
    assert arguments["ffn_dim"] == 4 * config.width
    found = from_published(
        weights, heads=arguments["n_heads"], feature_type=arguments["feature_type"], on_gptln=arguments["on_gptln"]
    )
    assert found.config == config


def test_names_that_do_not_fit_are_told_each() -> None:
    weights = published_weights()
    weights["layers.0.attention.qkv_map.weight"] = weights.pop("layers.0.attention.q_map.weight")
    del weights["output_logit_map.bias"]
    message = (
        r"missing: layers\.0\.attention\.q_map\.weight, output_logit_map\.bias; "
        r"unexpected: layers\.0\.attention\.qkv_map\.weight\. Expected"
    )
    with pytest.raises(InputError, match=message):
        from_published(weights, heads=HEADS)
    without = {name: value for name, value in published_weights().items() if not name.startswith("layers.0.")}
    with pytest.raises(InputError, match=r"missing: layers\.0\..*; unexpected: layers\.1\."):
        from_published(without, heads=HEADS)
    with pytest.raises(InputError, match=r"missing: .*input_map\.weight"):
        from_published({}, heads=HEADS)


def test_shapes_and_types_that_do_not_fit_are_told_each() -> None:
    weights = published_weights()
    weights["layers.1.V_map.weight"] = weights["layers.1.V_map.weight"].T
    weights["layers.0.layernorm2.bias"] = torch.zeros(WIDTH + 1, dtype=torch.float64)
    message = (
        r"layers\.0\.layernorm2\.bias \[25\] instead of \[24\], "
        r"layers\.1\.V_map\.weight \[40, 24\] instead of \[24, 40\]"
    )
    with pytest.raises(InputError, match=message):
        from_published(weights, heads=HEADS)
    with pytest.raises(InputError, match=r"input_map\.weight \[4\], expected two dimensions"):
        from_published(published_weights() | {"input_map.weight": torch.zeros(4, dtype=torch.float64)}, heads=HEADS)
    with pytest.raises(InputError, match=r"expected all in torch.float64, found others: V \(torch.int64\)"):
        from_published(published_weights() | {"V": torch.zeros(1, dtype=torch.int64)}, heads=HEADS)
    with pytest.raises(InputError, match=r"found others: model \(dict\)\. Pass the model's own state_dict"):
        from_published({"model": published_weights()}, heads=HEADS)
    with pytest.raises(InputError, match="width=24 is not a multiple of heads=5"):
        from_published(published_weights(), heads=5)


@pytest.mark.parametrize("feature_type", ["favor+", "favor+_2", "abs", "square"])
def test_features_that_have_no_counterpart_are_refused(feature_type: str) -> None:
    with pytest.raises(InputError, match=r"expected one of \['sqr', 'relu', 'elu\+1'\]\. Random features"):
        from_published(published_weights(), heads=HEADS, feature_type=feature_type)


def test_models_that_have_no_counterpart_there_are_refused() -> None:
    message = (
        "no such model: norm='rms' .only 'output' or 'pre'., normalize=False .only True., "
        "output_projection=True .only False., taps=4 .only 1.$"
    )
    with pytest.raises(InputError, match=message):
        to_published(Performer(SHAPES["modern"]))
    with pytest.raises(InputError, match=r"feature_map='favor' \(only 'square' or 'relu' or 'elu1'\)"):
        to_published(Performer(PerformerConfig(layers=1, width=8, heads=2, feature_map="favor")))


def test_a_checkpoint_becomes_a_model_of_the_command_line(tmp_path: Path) -> None:
    weights = published_weights(torch.float32)
    torch.save(weights, tmp_path / "published.pt")
    model = from_published(read_published(tmp_path / "published.pt"), heads=HEADS, on_gptln=False)
    save_tensors(tmp_path / "model.safetensors", model_tensors(model), describe_shape(model))
    read = read_model(tmp_path / "model.safetensors")
    assert read.config == model.config
    back = to_published(read)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


class Runs:
    """A pickle that writes a file when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a checkpoint of the published code, got: .*No such file"):
        read_published(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Runs(tmp_path / "run"), protocol=2))
    torch.save(Runs(tmp_path / "run"), tmp_path / "code.pt")
    for name in ("text.pt", "plain.pt", "code.pt"):
        with pytest.raises(InputError, match="found a file that torch does not read with weights_only=True"):
            read_published(tmp_path / name)
    assert not (tmp_path / "run").exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(InputError, match="expected a model's state_dict, found a list"):
        read_published(tmp_path / "list.pt")


class StandIn:
    """As the benchmark uses a published model, with the gradient of the mathematics above, of some weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights, self.grads = weights, dict[str, Tensor]()

    def double(self) -> StandIn:
        return StandIn({name: value.double() for name, value in self.weights.items()})

    def zero_grad(self, set_to_none: bool) -> None:
        self.grads = {}

    def loss_with_grad(self, tokens: Tensor, step_size: int) -> None:
        self.grads = published_gradient(self.weights, tokens, feature_type="sqr", on_gptln=True)

    def named_parameters(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for name, value in self.weights.items():
            parameter = torch.nn.Parameter(value)
            parameter.grad = self.grads.get(name)
            found.append((name, parameter))
        return found


def test_the_benchmark_times_nothing_that_has_another_gradient(tokens: Tensor) -> None:
    weights = published_weights(torch.float32)
    ours, one = from_published(weights, heads=HEADS), tokens[:1]
    wide = {name: value.double() for name, value in weights.items()}
    found = benchmark.compare(ours, StandIn(wide), one, CHUNK)
    assert 0 < found["float64_apart_worst"] < 1e-12
    assert 0 < found["published_error"] < 1e-12 < found["error"] < 1e-5
    assert found["apart"] == pytest.approx(found["error"], rel=1e-3)
    with pytest.raises(InputError, match=r"another gradient \(float64, the worst parameter\): .* Nothing timed"):
        benchmark.compare(ours, StandIn(swapped("q_map", "k_map")(wide)), one, CHUNK)


IMPORTS_ITSELF = """
import torch
import performer.models.{} as other

class SLiMPerformer(torch.nn.Module):
    def __init__(self, vocab_size, hidden_dim, n_layers, ffn_dim, n_heads, feature_type, compute_type, on_gptln):
        super().__init__()
        torch.cuda.synchronize()
        self.told = [vocab_size, hidden_dim, n_layers, ffn_dim, n_heads, feature_type, compute_type, on_gptln]
        self.told.append(other.WORD)
"""


def told(folder: str) -> list[Any]:
    """In a child process, as what is imported there stays imported."""
    config = PerformerConfig(layers=2, width=8, heads=2, norm="pre", feature_map="elu1")
    return benchmark.make_published(folder, config, "ps").told


@pytest.mark.parametrize(
    ("inside", "package"),
    [(".", "slim_performer.pytorch"), ("performer/models/slim_performer/pytorch", "pytorch.slim_performer")],
)
def test_the_benchmark_imports_the_published_code_from_a_folder(tmp_path: Path, inside: str, package: str) -> None:
    place = tmp_path / inside
    place.mkdir(parents=True, exist_ok=True)
    (place / "slim_performer_model.py").write_text(IMPORTS_ITSELF.format(f"{package}.numerator_and_denominator"))
    (place / "numerator_and_denominator.py").write_text("WORD = 'sums'\n")
    expected = [256, 8, 2, 32, 2, "elu+1", "ps", False, "sums"]
    assert call_in_child("tests.test_published:told", {"folder": str(tmp_path)}) == expected
    assert sorted(path.name for path in place.iterdir()) == ["numerator_and_denominator.py", "slim_performer_model.py"]


@pytest.mark.parametrize("inside", benchmark.INSIDE)
def test_the_benchmark_finds_the_published_code_in_a_folder(tmp_path: Path, inside: str) -> None:
    place = tmp_path / inside
    place.mkdir(parents=True, exist_ok=True)
    for file in benchmark.FILES:
        (place / file).write_text(IMPORTS_ITSELF)
    assert benchmark.find(str(tmp_path)) == place.resolve()


def test_the_benchmark_says_what_is_not_the_published_code(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder\. Name one that holds a copy of the published code"):
        benchmark.find(str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"not the published code, which has the files slim_performer_model\.py and"):
        benchmark.find(str(tmp_path))
    for file in benchmark.FILES:
        (tmp_path / file).write_text("")
    with pytest.raises(InputError, match=r"slim_performer_model\.py has no class SLiMPerformer: not the"):
        benchmark.find(str(tmp_path))
