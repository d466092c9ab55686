"""Feature maps: what turns queries and keys into non-negative features whose products stand in for softmax scores.

A feature map acts on each row alone. No maximum, mean or other statistic over time enters it, so a chunk has the same
features wherever the sequence is cut, and features never depend on later tokens.

=========  =====================================  ========  ==================================================
name       g(x)                                   features  source
=========  =====================================  ========  ==================================================
"square"   x^2                                    M = d     the paper's experiments
"abs"      |x|                                    M = d
"relu"     max(x, 0)                              M = d     the published code
"elu1"     elu(x) + 1                             M = d     the published code; Katharopoulos et al. 2020
"favor"    exp(w_m . x - |x|^2 / 2) / sqrt(M)     M free    Choromanski et al. 2021 (FAVOR+), lemma 1
=========  =====================================  ========  ==================================================

**Keeping exp in range without looking at other rows.** The published random features subtract a maximum over all keys:
a statistic over the chunk, which would make the gradient depend on where the chunks are cut and let later tokens move
earlier outputs. A maximum per row is no way out: for a query it cancels in the normalised output only, and for a key it
changes the kernel, as each key would be weighted by its own factor. What remains is to bound the exponent by a
constant. By lemma 1 each exponential has mean exactly 1 over the draw of w, so by Markov's inequality the exponent
exceeds a with probability at most e^-a. It is therefore cut off at `EXPONENT_CEILING` = 40: an event of probability
below 5e-18 per feature, against a guarantee that no input overflows float32 or bfloat16 (a product of two features is
at most e^80 / M, and e^88 still fits). The map stays a function of its row, and the estimate of exp(q . k) is
unbiased up to that event. Nothing is done about small features: for |x|^2 far above |w|^2 ~ d they vanish, as the
variance of the estimate grows like exp(|q + k|^2); scale the inputs (by d^(-1/4) for the 1/sqrt(d) of softmax
attention, which the map itself does not apply).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Rows: TypeAlias = Float[Tensor, "batch time heads head_dim"]
FeatureRows: TypeAlias = Float[Tensor, "batch time heads features"]
Projection: TypeAlias = Float[Tensor, "heads features head_dim"]

EXPONENT_CEILING = 40.0


def square(x: Rows) -> FeatureRows:
    """Return x^2 elementwise, the map of the paper's experiments; M = d."""
    return x.square()


def absolute(x: Rows) -> FeatureRows:
    """Return |x| elementwise; M = d."""
    return x.abs()


def relu(x: Rows) -> FeatureRows:
    """Return max(x, 0) elementwise; M = d."""
    return x.relu()


def elu1(x: Rows) -> FeatureRows:
    """Return elu(x) + 1 elementwise: x + 1 for positive x, exp(x) for negative; M = d."""
    return functional.elu(x) + 1


def favor(x: Rows, projection: Projection) -> FeatureRows:
    """Return positive random features exp(w_m . x - |x|^2 / 2) / sqrt(M), an estimate of exp(q . k) as g(q) . g(k).

    Shapes: x ``[batch, time, heads, d]``, projection ``[heads, M, d]`` from `draw_projection`; returns
    ``[batch, time, heads, M]`` in x's dtype. 16-bit inputs are mapped in float32, under autocast too.
    Raises ValueError when the projection does not fit x. Cost: O(L d M) time, O(L M) memory.
    """
    B, T, H, d = x.shape
    if projection.dim() != 3 or projection.shape[0] != H or projection.shape[2] != d:
        raise ValueError(
            f"expected a projection [heads, features, head_dim] = [{H}, M, {d}]; got {list(projection.shape)}: "
            f"draw it with draw_projection({H}, {d}, num_features)"
        )
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(dtype)
        rows_H_BT_d = wide.permute(2, 0, 1, 3).reshape(H, B * T, d)
        wx_BTHM = torch.bmm(rows_H_BT_d, projection.to(dtype).mT).view(H, B, T, -1).permute(1, 2, 0, 3)
        exponent = wx_BTHM - wide.square().sum(-1, keepdim=True) / 2
        return (exponent.clamp(max=EXPONENT_CEILING).exp() * projection.shape[1] ** -0.5).to(x.dtype)


def draw_projection(
    num_heads: int,
    head_dim: int,
    num_features: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Projection:
    """Draw the random directions of `favor`: Gaussian rows, orthogonal within each block of ``head_dim`` rows.

    Each head has its own draw. The directions of a block are a Haar-random orthonormal frame (QR of a Gaussian matrix,
    signs fixed) and each row's length is that of an independent Gaussian vector, so every row alone is exactly
    N(0, I): the estimate stays unbiased, and orthogonality only lowers its variance.

    Returns ``[num_heads, num_features, head_dim]``. The draw is made on the generator's device (CPU without one), in
    float64, then moved, so one seed gives one projection everywhere. Constant over a sequence; redraw between calls.
    """
    if min(num_heads, head_dim, num_features) < 1:
        raise ValueError(
            f"expected num_heads, head_dim and num_features of at least 1; got {num_heads}, {head_dim}, {num_features}"
        )
    where = generator.device if generator is not None else torch.device("cpu")
    num_blocks = -(-num_features // head_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device=where)

    q, r = torch.linalg.qr(normal(num_heads, num_blocks, head_dim, head_dim))
    frame = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    rows = frame.mT.reshape(num_heads, num_blocks * head_dim, head_dim)[:, :num_features]
    lengths = normal(num_heads, num_features, head_dim).norm(dim=-1, keepdim=True)
    return (rows * lengths).to(dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """A feature map by name; call it with the rows, and with a projection exactly where it needs one."""

    name: str
    elementwise: Callable[[Tensor], Tensor] | None  # None: random features

    @property
    def needs_projection(self) -> bool:
        """Whether a call takes a projection from `draw_projection`."""
        return self.elementwise is None

    def __call__(self, x: Rows, projection: Projection | None = None) -> FeatureRows:
        """Return the features of each row of x, ``[batch, time, heads, features]``, in x's dtype."""
        if self.elementwise is None:
            if projection is None:
                raise ValueError(
                    f"feature map {self.name!r} expected a projection and got None: pass draw_projection(...)"
                )
            return favor(x, projection)
        if projection is not None:
            raise ValueError(
                f"feature map {self.name!r} takes no projection; got one of {list(projection.shape)}: drop it"
            )
        return self.elementwise(x)


FEATURE_MAPS: dict[str, FeatureMap] = {
    name: FeatureMap(name, function)
    for name, function in {"square": square, "abs": absolute, "relu": relu, "elu1": elu1, "favor": None}.items()
}


def get_feature_map(name: str) -> FeatureMap:
    """Return the feature map of that name; raise ValueError listing the known names otherwise."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"expected a feature map among {list(FEATURE_MAPS)}; got {name!r}")
    return FEATURE_MAPS[name]
