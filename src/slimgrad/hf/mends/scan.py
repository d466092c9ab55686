"""Mamba-1 (mamba, falcon_mamba, jamba, zamba): a scan that starts from zero, given the state before it.

Their mixers read the recurrent state from the cache but start `mamba_selective_scan` at zero unless a single token is
decoded, so a second chunk forgets the first. The scan is linear in its state: with `h_t = exp(A dt_t) h_{t-1} + ...`
and `y_t = C_t h_t`, the state h before the chunk adds `C_t exp(A sum_{s <= t} dt_s) h` to `y_t` and
`exp(A sum_s dt_s) h` to the last state. That is added, before the gate; whichever kernel computes the scan.

Cost: a tensor `[batch, width, time, state]`, as the scan itself makes several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgrad.errors import ModelError
from slimgrad.hf.cache import FunctionalCache
from slimgrad.hf.mends.forward import MendedForward, put_on
from slimgrad.hf.step import BaseStep

_SCAN = "mamba_selective_scan"


class ScanStep(BaseStep):
    """The base with its mixers' scans continued from the state before the chunk."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not put_on(self.base, ScanForward, _SCAN) and self.config.get_text_config().num_hidden_layers:
            raise ModelError(f"no module of {type(self.base).__name__} calls {_SCAN}, which slimgrad mends")


class ScanForward(MendedForward):
    """A mixer's."""

    def replaced(self, function: Callable[..., Any], cache: FunctionalCache) -> Callable[..., Any]:
        layer: Any = cache.layers[self.module.layer_idx]  # pyright: ignore[reportArgumentType, reportCallIssue]
        return _ScanFrom(function, layer.before["recurrence"][0])


class _ScanFrom:
    """The scan from a state `[batch, width, state]`; or, called once for each head, `[batch, heads, width, state]`."""

    def __init__(self, scan: Callable[..., Any], before: Tensor) -> None:
        self.scan, self.heads = scan, list(before.unbind(1)) if before.dim() == 4 else [before]

    def __call__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        """`u`, `dt` `[batch, width, time]`, `A` `[width, state]`, `B`, `C` `[batch, state, time]`."""
        before, how = self.heads.pop(0), {"delta_bias": delta_bias, "delta_softplus": delta_softplus, **options}
        y, last = self.scan(u, dt, A, B, C, D=D, z=None, return_last_state=True, **how)
        delta = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        delta = F.softplus(delta) if delta_softplus else delta
        decay = torch.exp(A[None, :, None, :] * delta.cumsum(-1)[..., None])
        y = y + torch.einsum("bdtn,bdn,bnt->bdt", decay, before.to(decay.dtype), C.to(decay.dtype)).to(y.dtype)
        last = last + (decay[:, :, -1] * before).to(last.dtype)
        if z is not None:
            y = y * F.silu(z)
        return (y, last) if return_last_state else y
