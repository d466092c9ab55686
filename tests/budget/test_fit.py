"""What one chunk takes, from a few measurements: exact where it is of that form, and safe where it is not."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from slimgrad.budget.fit import Fit, Point

SIZES = (64, 128, 256)
VALUES = st.one_of(st.just(0.0), st.floats(1e-3, 1e9))
POINTS = st.lists(
    st.builds(Point, st.integers(1, 5000), st.integers(0, 20_000), VALUES), min_size=1, max_size=12
)  # fmt: skip
coefficients = st.tuples(
    st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 50), st.integers(0, 500), st.integers(0, 50)
)


def polynomial(c: tuple[float, ...], chunk: int, before: float, *, seconds: bool = False) -> float:
    a, b, square, d, e = c
    if seconds:
        return a + b * chunk + d * before + e * chunk * (before + chunk / 2)
    return a + b * chunk + square * chunk * chunk + d * before + e * chunk * before


@given(coefficients)
@pytest.mark.parametrize("grows", [False, True])
def test_bytes_of_that_form_are_found_exactly(grows: bool, c: tuple[int, ...]) -> None:
    """Within what was measured and beyond it; with rows, near the beginning."""
    c = c if grows else (*c[:3], 0, 0)
    places = [(size, size * k) for size in SIZES for k in range(4)]
    fit = Fit([Point(*place, polynomial(c, *place)) for place in places], grows=grows)
    for place in [*places, (100, 37), (200, 500), (2000, 0), (10_000, 30_000 if grows else 0)]:
        assert fit(*place) == pytest.approx(polynomial(c, *place), rel=1e-5)


@given(coefficients)
def test_far_from_the_beginning_as_well(c: tuple[int, ...]) -> None:
    near = [(size, size * k) for size in SIZES for k in range(4)]
    far = [(size, before) for size in (16, *SIZES) for before in (4 * size, 4000)]
    fit = Fit([Point(*place, polynomial(c, *place)) for place in near + far], grows=True)
    for place in [(16, 100_000), (64, 100_000), (256, 100_000), (200, 20_000)]:
        assert fit(*place) == pytest.approx(polynomial(c, *place), rel=1e-3)


@given(coefficients)
def test_seconds_of_that_form_are_found_exactly(c: tuple[int, ...]) -> None:
    places = [(size, size * k) for size in SIZES for k in range(4)]
    points = [Point(*place, 1e-9 * polynomial(c, *place, seconds=True)) for place in places]
    fit = Fit(points, grows=True, seconds=True)
    for place in [*places, (2000, 0), (10_000, 30_000)]:
        assert fit(*place) == pytest.approx(1e-9 * polynomial(c, *place, seconds=True), rel=1e-5)


@given(POINTS, st.booleans(), st.sampled_from([None, 100, 3000]))
@example([Point(64, 0, 0.0), Point(64, 64, 5.0)], True, None)
def test_no_measurement_of_bytes_lies_above(points: list[Point], grows: bool, reach: int | None) -> None:
    fit = Fit(points, grows=grows, reach=reach)
    for point in points:
        assert fit(point.chunk, point.before) >= point.value * (1 - 1e-9)


@given(POINTS, st.booleans())
def test_no_measurement_of_seconds_lies_below(points: list[Point], grows: bool) -> None:
    fit = Fit(points, grows=grows, seconds=True)
    for point in points:
        assert fit(point.chunk, point.before) <= point.value * (1 + 1e-9)


@given(POINTS, st.booleans(), st.booleans())
def test_nothing_is_negative_and_all_is_finite(points: list[Point], grows: bool, seconds: bool) -> None:
    fit = Fit(points, grows=grows, seconds=seconds)
    for chunk, before in itertools.product((1, 16, 1000, 10**6), (0, 100, 10**7)):
        assert 0 <= fit(chunk, before) < float("inf")


@pytest.mark.parametrize("seconds", [False, True])
def test_one_size_alone_and_zeros(seconds: bool) -> None:
    one = Fit([Point(64, 0, 640.0), Point(64, 64, 640.0)], grows=False, seconds=seconds)
    assert one(64) == pytest.approx(640)
    assert one(128) >= 640 * (1 - 1e-9)
    nothing = Fit([Point(64, 0, 0), Point(128, 0, 0)], grows=True, seconds=seconds)
    assert nothing(100, 5000) == 0


def test_of_a_window_no_more_counts_than_lies_in_it() -> None:
    def truth(chunk: int, before: int) -> float:
        return 100 + 50 * chunk + 7 * chunk * min(before, 90)

    places = [(size, size * k) for size in SIZES for k in range(4)]
    fit = Fit([Point(*place, truth(*place)) for place in places], grows=True, reach=90)
    for place in [*places, (200, 10**6), (1000, 5000)]:
        assert truth(*place) * (1 - 1e-9) <= fit(*place) <= 1.1 * truth(*place)
    assert truth(1000, 0) <= fit(1000, 0) <= truth(1000, 90) * 1.001  # far from all sizes: as if the window were full


def test_steps_between_sizes_that_were_measured() -> None:
    """Blocks of 32 tokens, as some models have. Where they seem to bend upwards, more is said than is."""

    def truth(chunk: int) -> float:
        return 1000 + 64 * (-(-chunk // 32) * 32)

    fit = Fit([Point(size, 0, truth(size)) for size in (16, 64, 128, 256, 1000)], grows=False)
    assert fit(16) == pytest.approx(truth(16))  # the small one does not bend the curve of the large ones
    assert truth(10_000) <= fit(10_000) <= 1.4 * truth(10_000)
