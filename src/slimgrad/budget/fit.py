"""What one chunk takes, as a function of its tokens C and of the tokens p before it, from a few measurements.

    bytes(C, p)   = a + b C + c C^2 + d p + e C p        seconds(C, p) = a + b C + d p + e C (p + C / 2)

No coefficient is negative. b is what layers keep of every token, c attention within the chunk, d rows that are copied
whole, e attention to rows before the chunk; d and e only where the state has rows. Seconds have noise: there a C^2
without rows would be noise times the square of a size that is far from what was measured.

Then y is scaled so that no measurement of bytes lies above it, and none of seconds, which other work only makes longer,
below: by how much, is interpolated between the sizes that were measured, and beyond the largest stays as it was there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """One measurement: tokens of the chunk, tokens before it, and what it took."""

    chunk: int
    before: int
    value: float


class Fit:
    """A quantity of one chunk.

    Args:
        points: measurements, of one size of chunk at least.
        grows: whether the state has rows.
        seconds: and not bytes.
    """

    def __init__(self, points: Sequence[Point], *, grows: bool, seconds: bool = False) -> None:
        self.points, self._grows, self._seconds = tuple(points), grows, seconds
        most = max(1e-9, *(point.value for point in points), 0.0)
        weights = np.array([1 / max(point.value, 1e-3 * most) for point in points])  # errors count relatively
        columns = np.array([self._terms(point.chunk, point.before) for point in points])
        values = np.array([point.value for point in points])
        self.coefficients = _nonnegative(columns * weights[:, None], values * weights)
        sizes = sorted({point.chunk for point in points})
        over = {size: [self._over(point) for point in points if point.chunk == size] for size in sizes}
        self._sizes = [math.log(size) for size in sizes]
        self._ratios = [min(over[size]) if seconds else max(over[size]) for size in sizes]

    def __call__(self, chunk: int, before: float = 0.0) -> float:
        """What a chunk of so many tokens takes after so many others."""
        ratio = float(np.interp(math.log(chunk), self._sizes, self._ratios))
        return ratio * self._plain(chunk, before)

    def _plain(self, chunk: int, before: float) -> float:
        return float(self._terms(chunk, before) @ self.coefficients)

    def _over(self, point: Point) -> float:
        fitted = self._plain(point.chunk, point.before)
        return point.value / fitted if fitted > 0 else 1.0

    def _terms(self, chunk: int, before: float) -> np.ndarray:
        square = 0.0 if self._seconds else float(chunk) * chunk
        rows = (before, chunk * (before + (chunk / 2 if self._seconds else 0.0))) if self._grows else ()
        return np.array([1.0, chunk, square, *rows])


def _nonnegative(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: the terms that would have one are left out, the worst first."""
    kept = list(range(columns.shape[1]))
    scale = np.abs(columns).max(0) + 1e-300  # terms differ by powers of ten
    found = np.zeros(columns.shape[1])
    while kept:
        solved = np.linalg.lstsq(columns[:, kept] / scale[kept], values, rcond=1e-9)[0]
        if solved.min() >= 0:
            found[kept] = solved / scale[kept]
            break
        kept.pop(int(solved.argmin()))
    return found
