"""The sketch in the terminal."""

from __future__ import annotations

import pytest

from slimgrad.cli.curve import sketch, smooth
from slimgrad.cli.session import choose_prompt


def test_smooth_is_a_trailing_mean() -> None:
    assert smooth([4.0, 2.0, 6.0, 0.0], 2) == [4, 3, 4, 3]
    assert smooth([1.0, 2.0], 1) == [1, 2]


def test_sketch_falls_from_the_top_left_to_the_bottom_right() -> None:
    top, *drawn, bottom, steps = sketch([3.0, 2.0, 1.0], width=3, height=3, unicode=False)
    assert top.rstrip() == bottom.rstrip() == "+---+"
    assert [line[:5] for line in drawn] == ["|+  |", "| + |", "|  +|"]
    assert drawn[0].endswith("3")
    assert drawn[2].endswith("1")
    assert steps.split()[-1] in ("2", "3")


@pytest.mark.parametrize("values", [[2.0], [2.0] * 50, [i / 100 for i in range(1000)]])
@pytest.mark.parametrize("unicode", [True, False])
def test_sketch_fits_its_size(values: list[float], unicode: bool) -> None:
    lines = sketch(values, width=20, height=5, unicode=unicode)
    assert len(lines) == 5 + 3  # a frame, and the steps below it
    assert all(len(line) <= 20 + 2 + 8 for line in lines)
    assert all(line.isascii() for line in lines) is not unicode
    assert any(set(line[1:21]) - {" "} for line in lines[1:6])


def test_the_prompt_is_the_line_with_the_most_letters() -> None:
    assert choose_prompt(b"1 | 2 |" * 20 + b"\nletters here\n  3") == b"letters here\n  3"
    assert choose_prompt(b"12") == b"12"
    assert choose_prompt(b"\n") == b"\n"
    assert len(choose_prompt(b"a" * 500)) == 64
