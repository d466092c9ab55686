"""Feature maps act on one row at a time, and the random ones estimate the exponential kernel."""

import math

import pytest
import torch
from torch import Tensor

from slimgrad.ops import FEATURE_MAPS, draw_projection, get_feature_map
from slimgrad.ops.feature_maps import EXPONENT_CEILING

NAMES = ["square", "abs", "relu", "elu1", "favor"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(name: str, x: Tensor, projection: Tensor) -> Tensor:
    feature_map = get_feature_map(name)
    return feature_map(x, projection if feature_map.needs_projection else None)


def test_the_registry_holds_these_names() -> None:
    assert list(FEATURE_MAPS) == NAMES
    assert [n for n in NAMES if get_feature_map(n).needs_projection] == ["favor"]


def test_elementwise_values() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0]).view(1, 1, 1, 4)
    none = torch.empty(0)
    assert features("square", x, none).flatten().tolist() == [4.0, 0.25, 0.0, 9.0]
    assert features("abs", x, none).flatten().tolist() == [2.0, 0.5, 0.0, 3.0]
    assert features("relu", x, none).flatten().tolist() == [0.0, 0.0, 0.0, 3.0]
    want = torch.tensor([math.exp(-2.0), math.exp(-0.5), 1.0, 4.0])
    torch.testing.assert_close(features("elu1", x, none).flatten(), want)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    x = torch.randn(2, 3, 2, 5, generator=seeded(1), dtype=torch.float64).requires_grad_()
    projection = draw_projection(2, 5, 7, generator=seeded(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: features(name, x, projection), [x])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_features_whatever_surrounds_it(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 67, 3, 17, generator=seeded(3)).to(dtype)
    projection = draw_projection(3, 17, 29, generator=seeded(4))
    whole = features(name, x, projection)
    assert whole.dtype is dtype
    assert (whole >= 0).all()
    for a, b in [(0, 1), (40, 41), (0, 40), (13, 67)]:
        alone = features(name, x[:, a:b], projection)
        if name in ("elu1", "favor"):
            # the last bit of exp depends on the place in a vector register, that of a product on the number of rows;
            # measured: elu1 3.6e-7, favor 2.0e-6, and in bfloat16 no difference
            eps = 5e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(alone, whole[:, a:b], rtol=eps, atol=0)
        else:
            assert torch.equal(alone, whole[:, a:b])


def test_a_huge_later_row_leaves_earlier_rows_alone() -> None:
    # the published stabiliser subtracts a maximum over all keys: it fails here
    x = torch.randn(1, 9, 2, 4, generator=seeded(5))
    projection = draw_projection(2, 4, 6, generator=seeded(6))
    want = features("favor", x, projection)
    x[:, 5:] *= 100
    assert torch.equal(features("favor", x, projection)[:, :5], want[:, :5])


def test_projection_rows_are_orthogonal_within_a_block_and_of_gaussian_length() -> None:
    d, M = 16, 41
    w = draw_projection(300, d, M, generator=seeded(7), dtype=torch.float64)
    assert w.shape == (300, M, d)
    for block in w.split(d, 1):
        unit = block / block.norm(dim=-1, keepdim=True)
        gram = unit @ unit.mT
        assert (gram - torch.eye(block.shape[1], dtype=w.dtype)).abs().max() < 1e-13  # measured: 1.2e-15
    # |w|^2 is chi-squared with d degrees of freedom: mean d, variance 2 d; five standard errors
    squares = w.square().sum(-1)
    assert abs(squares.mean().item() - d) < 5 * (2 * d / squares.numel()) ** 0.5
    # rows of different blocks are independent, not orthogonal
    assert (w[:, 0] * w[:, d]).sum(-1).abs().mean() > 1


def test_projection_is_a_function_of_its_generator_and_differs_between_heads() -> None:
    first = draw_projection(2, 8, 8, generator=seeded(8))
    assert torch.equal(first, draw_projection(2, 8, 8, generator=seeded(8)))
    assert not torch.allclose(first, draw_projection(2, 8, 8, generator=seeded(9)))
    assert not torch.allclose(first[0], first[1])
    assert first.dtype is torch.float32
    assert draw_projection(1, 3, 5, dtype=torch.float64).dtype is torch.float64


@pytest.mark.parametrize("num_features", [8, 20])
def test_favor_estimates_the_exponential_kernel_without_bias(num_features: int) -> None:
    draws, d = 40_000, 8
    q, k = (0.35 * torch.randn(1, 1, 1, d, generator=seeded(s), dtype=torch.float64) for s in (10, 11))
    # every head is one independent draw
    w = draw_projection(draws, d, num_features, generator=seeded(12), dtype=torch.float64)
    fq, fk = (features("favor", x.expand(1, 1, draws, d), w) for x in (q, k))
    estimates = (fq * fk).sum(-1).flatten()
    exact = torch.exp((q * k).sum()).item()
    standard_error = estimates.std().item() / draws**0.5
    assert standard_error < 0.01 * exact  # so that a bias of 5 percent is seen
    assert abs(estimates.mean().item() - exact) < 5 * standard_error  # a false alarm once in 1.7 million seeds
    # the variance of independent Gaussian rows is exact^2 (exp(|q + k|^2) - 1) / M: orthogonal rows stay below it
    independent = exact**2 * (math.exp((q + k).square().sum().item()) - 1) / num_features
    assert estimates.var().item() < 1.05 * independent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_favor_never_overflows(dtype: torch.dtype) -> None:
    # worst rows: x = w gives the largest exponent there is, |w|^2 / 2
    w = draw_projection(2, 512, 16, generator=seeded(13))
    x = w.unsqueeze(0).transpose(1, 2).to(dtype)
    assert (w.square().sum(-1) / 2).max() > 2 * EXPONENT_CEILING
    f = features("favor", x, w)
    assert f.isfinite().all()
    assert (f.float() @ f.float().mT).isfinite().all()


def test_favor_under_autocast_has_the_same_bits() -> None:
    x = torch.randn(1, 5, 2, 8, generator=seeded(14))
    w = draw_projection(2, 8, 8, generator=seeded(15))
    want = features("favor", x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features("favor", x, w), want)


def test_errors_say_what_was_expected_and_what_came() -> None:
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"among \['square', 'abs', 'relu', 'elu1', 'favor'\]; got 'softmax'"):
        get_feature_map("softmax")
    with pytest.raises(ValueError, match="'favor' expected a projection and got None"):
        get_feature_map("favor")(x)
    with pytest.raises(ValueError, match=r"'square' takes no projection; got one of \[3, 5, 4\]"):
        get_feature_map("square")(x, torch.ones(3, 5, 4))
    with pytest.raises(ValueError, match=r"\[3, M, 4\]; got \[4, 5, 3\]: draw it with draw_projection\(3, 4"):
        get_feature_map("favor")(x, torch.ones(4, 5, 3))
    with pytest.raises(ValueError, match="of at least 1; got 2, 0, 4"):
        draw_projection(2, 0, 4)
