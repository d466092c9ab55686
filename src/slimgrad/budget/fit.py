"""What one chunk takes, as a function of its tokens C and of the tokens p before it, from a few measurements.

    bytes(C, p)   = a + b C + c C^2 + d p + e C p        seconds(C, p) = a + b C + d p + e C (p + C / 2)

No coefficient is negative. b is what layers keep of every token, c attention within the chunk, d rows that are copied
whole, e attention to rows before the chunk; d and e only where the state has rows. Seconds have noise: there a C^2
without rows would be noise times the square of a size that is far from what was measured.

A peak is the most of several such moments. Where p is 4 C or more another one may count than where it is less, so
that bytes have a fit for either, and the larger counts. Of rows in a window p is what lies within it; chunks before
which it is not full have a fit of their own.

Then y is scaled so that no measurement of bytes lies above it, and none of seconds, which other work only makes longer,
below: by how much, is interpolated between the sizes that were measured, and beyond the largest stays as it was there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

SHRUNK = (1, 2, 4, 8, 16, 32, 64)  # parts of a threshold
_FAR = 4  # chunks before
_NEAR = 1.5  # times the largest size that was measured
_ENOUGH = 3  # sizes
_SMALL = 64  # tokens: below, how a model takes its chunk apart itself may count for more than the terms above


class Point(NamedTuple):
    """One measurement: tokens of the chunk, tokens before it, and what it took."""

    chunk: int
    before: float
    value: float


class Fit:
    """A quantity of one chunk.

    Args:
        points: measurements, of one size of chunk at least.
        grows: whether the state has rows.
        seconds: and not bytes.
        reach: rows before it that a chunk sees; None: all.
    """

    def __init__(
        self, points: Sequence[Point], *, grows: bool, seconds: bool = False, reach: int | None = None
    ) -> None:
        self.points, self._grows, self._seconds, self._reach = tuple(points), grows, seconds, reach
        most: dict[tuple[int, float], float] = {}  # or least: of several at one place
        kinds: dict[tuple[int, float], tuple[bool, bool]] = {}
        for chunk, before, value in points:
            place = chunk, self._seen(before) if grows else 0.0
            most[place] = (min if seconds else max)(value, most.get(place, value))
            kinds[place] = self._kind(chunk, before)
        self._curves = {
            kind: _Curve(
                [Point(*place, value) for place, value in most.items() if kinds[place] == kind], grows, seconds
            )
            for kind in {*kinds.values()}
        }

    def __call__(self, chunk: int, before: float = 0.0) -> float:
        """What a chunk of so many tokens takes after so many others."""
        whole, far = self._kind(chunk, before)
        between = far and self._seen(before) < 2 * _FAR * chunk
        fitting = [self._curves[kind] for kind in {(whole, far), (whole, far and not between)} if kind in self._curves]
        for kind in ((whole, False), (not whole, False)):  # where a chunk is far from all sizes
            if kind in self._curves and not any(curve.covers(chunk) for curve in fitting):
                fitting.append(self._curves[kind])
        return max(curve(chunk, self._seen(before)) for curve in fitting or self._curves.values())

    def _seen(self, before: float) -> float:
        return before if self._reach is None else min(before, self._reach)

    def _kind(self, chunk: int, before: float) -> tuple[bool, bool]:
        """Whether all of a window is there, and whether what is seen before the chunk is much longer than it is."""
        if self._seconds or not self._grows:
            return False, False
        whole = self._reach is not None and before >= self._reach
        return whole, self._seen(before) >= _FAR * chunk


class Small:
    """Bytes in small blocks.

    A block that grows with the chunk is small in one of k times the size if it is below a k-th of the threshold now.

    Args:
        fits: of bytes in blocks below the threshold, and below parts of it, by `SHRUNK`; measured at the same sizes.
    """

    def __init__(self, fits: Sequence[Fit]) -> None:
        self._fits, self._most = fits, max(point.chunk for point in fits[0].points)

    def __call__(self, chunk: int, before: float = 0.0) -> float:
        """Of a chunk of so many tokens after so many others."""
        larger = chunk / self._most
        k = max(k for k, shrunk in enumerate(SHRUNK) if shrunk <= max(1.0, larger))
        return self._fits[k](chunk, before)


class _Curve:
    """Points fitted by one sum of terms. Args: see `Fit`."""

    def __init__(self, points: Sequence[Point], grows: bool, seconds: bool) -> None:
        self._grows, self._seconds = grows, seconds
        sizes = sorted({point.chunk for point in points})
        large = [size for size in sizes if size >= _SMALL]
        fitted = [point for point in points if point.chunk >= _SMALL or len(large) < _ENOUGH]
        most = max(1e-9, *(point.value for point in fitted), 0.0)
        weights = np.array([1 / max(point.value, 1e-3 * most) for point in fitted])  # errors count relatively
        columns = np.array([self._terms(point.chunk, point.before) for point in fitted])
        values = np.array([point.value for point in fitted])
        self._coefficients: list[float] = _nonnegative(columns * weights[:, None], values * weights).tolist()
        self._coefficients[0] = max(self._coefficients[0], 1e-9 * most)  # there is something to be scaled
        self._least, self._most = sizes[0], sizes[-1]
        over = {size: [self._over(point) for point in points if point.chunk == size] for size in sizes}
        self._ratio_at: dict[int, float] = {}
        self._sizes = [math.log(size) for size in sizes]
        self._ratios = [min(over[size]) if seconds else max(over[size]) for size in sizes]

    def covers(self, chunk: int) -> bool:
        """Whether such a chunk lies among those that were measured, or near the largest."""
        return self._least <= chunk <= _NEAR * self._most

    def __call__(self, chunk: int, before: float) -> float:
        if chunk not in self._ratio_at:
            self._ratio_at[chunk] = float(np.interp(math.log(chunk), self._sizes, self._ratios))
        return self._ratio_at[chunk] * self._plain(chunk, before)

    def _plain(self, chunk: int, before: float) -> float:
        return sum(x * y for x, y in zip(self._terms(chunk, before), self._coefficients, strict=True))

    def _over(self, point: Point) -> float:
        return point.value / self._plain(point.chunk, point.before)

    def _terms(self, chunk: int, before: float) -> tuple[float, ...]:
        square = 0.0 if self._seconds else float(chunk) * chunk
        rows = (before, chunk * (before + (chunk / 2 if self._seconds else 0.0))) if self._grows else ()
        return 1.0, chunk, square, *rows


def _nonnegative(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares without negative coefficients: the best set of terms whose own least squares has none."""
    scale = np.abs(columns).max(0) + 1e-300  # terms differ by powers of ten
    scaled = columns / scale
    found, least = np.zeros(columns.shape[1]), float(values @ values)
    for count in range(1, columns.shape[1] + 1):
        for kept in map(list, combinations(range(columns.shape[1]), count)):
            solved = np.linalg.lstsq(scaled[:, kept], values, rcond=1e-9)[0]
            error = float(np.square(scaled[:, kept] @ solved - values).sum())
            if solved.min() >= 0 and error < least * (1 - 1e-6) - 1e-24:  # else fewer terms do as well
                found, least = np.zeros(columns.shape[1]), error
                found[kept] = solved / scale[kept]
    return found
