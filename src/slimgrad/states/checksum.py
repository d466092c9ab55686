"""64 bits of a tensor, to tell whether any of its bits changed."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE, _PIECE_ELSEWHERE = 1 << 18, 1 << 22  # elements: what stays in a CPU's cache; what fills a GPU
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """64 bits that change when any one element of `x` changes in any bit: a 0-d int64 tensor, without synchronising.

    The bits, read as integers, are weighted by the odd numbers 1, 3, 5, ... and summed modulo 2^64. An odd weight is
    invertible there, so no single change is lost. Weights differ by even numbers, so where two 64-bit numbers that
    differ only in their upper bits (1.0 and 2.0, x and -x) change places, the sum may stay: so the upper half is folded
    into the lower first, which loses nothing, and a swap shows. Cost: two passes, five for 64-bit numbers, in pieces of
    2 MiB (32 on a device).
    """
    if x.dtype.is_complex:
        x = torch.view_as_real(x.resolve_conj())
    bits = x.detach().contiguous().view(-1).view(_INTEGERS[x.element_size()])
    total: Tensor | None = None
    length = _PIECE if x.device.type == "cpu" else _PIECE_ELSEWHERE
    for start in range(0, max(bits.numel(), 1), length):
        piece = bits[start : start + length] if bits.numel() > length else bits
        weights = torch.arange(2 * start + 1, 2 * (start + piece.numel()) + 1, 2, device=x.device)
        if piece.dtype is torch.int64:  # folded by a bijection: the shift must not bring the sign in
            piece = (piece >> 32).bitwise_and_(0xFFFFFFFF).bitwise_xor_(piece)
        part = weights.mul_(piece).sum()
        total = part if total is None else total + part
    assert total is not None
    return total
