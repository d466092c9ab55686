"""Sums that come back to their exact bits, and stay true to the exact sum on the way."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimgrad import NonFiniteError, PrefixSum, StateMismatchError, backward
from slimgrad.states.accumulator import Accumulator, kept_bytes
from slimgrad.states.base import Purpose, Setting
from slimgrad.states.sums import SumCarrier
from slimgrad.sweep.cut import Span
from slimgrad.sweep.store import Store
from tests.toy_models import LinearAttention

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPE = (5,)


def add(sums: Accumulator, delta: Tensor, *, log: bool = True) -> None:
    """As a sweep does it in each chunk."""
    sums.add(delta)
    looks = sums.looks()
    sums.settle(None if looks is None else int(looks))
    sums.done(log=log)


def bits(x: Tensor) -> list[int]:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).tolist()


def standing(sums: Accumulator) -> tuple:
    """Everything that must be the same again: steps, quanta, value."""
    return sums.data.tolist(), sums.exponents.tolist(), bits(sums.value())


def exactly(sums: Accumulator) -> list[Fraction]:
    """The sum that is held, without rounding."""
    return [step * Fraction(2) ** k for step, k in zip(sums.data.tolist(), sums.exponents.tolist(), strict=True)]


@st.composite
def contributions(draw: st.DrawFn, dtype: torch.dtype) -> list[Tensor]:
    """Deltas of scales from 1e-30 to 1e30 (1e-6 to 1e3 in float16), of both signs, with zeros among them.

    A scale is that of a whole delta, or each element has its own.
    """
    low, high = (-6, 3) if dtype == torch.float16 else (-30, 30)
    element = st.one_of(st.just(0.0), st.floats(-1, 1, width=32))
    scales = st.one_of(
        st.integers(low, high).map(lambda scale: [scale] * 5), st.lists(st.integers(low, high), min_size=5, max_size=5)
    )
    deltas = []
    for each in draw(st.lists(scales, min_size=1, max_size=12)):
        delta = torch.tensor(draw(st.lists(element, min_size=5, max_size=5)), dtype=torch.float64)
        deltas.append((delta * 10.0 ** torch.tensor(each, dtype=torch.float64)).to(dtype))
    return deltas


def held_bytes(dtype: torch.dtype) -> int:
    """Of one element, but for the log."""
    return 16 if dtype == torch.float64 else 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=120)
@given(data=st.data())
def test_what_was_added_can_be_subtracted_again_bit_for_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    deltas = data.draw(contributions(dtype))
    sums = Accumulator(
        data.draw(contributions(dtype))[0] if data.draw(st.booleans()) else torch.zeros(SHAPE, dtype=dtype)
    )
    seen = [standing(sums)]
    for delta in deltas:
        add(sums, delta)
        seen.append(standing(sums))
    for delta in reversed(deltas):
        assert standing(sums) == seen.pop()
        sums.subtract(delta)
    assert standing(sums) == seen.pop()
    assert sums.nbytes == 5 * held_bytes(dtype)  # nothing is left in the log


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=120)
@given(data=st.data())
def test_the_value_is_the_exact_sum_but_for_a_stated_rounding(dtype: torch.dtype, data: st.DataObject) -> None:
    """The oracle is rational. An addition rounds by half a quantum, and a widening by half of the new one."""
    deltas = data.draw(contributions(dtype))
    sums = Accumulator(torch.zeros(SHAPE, dtype=dtype))
    exact, allowed, largest = [Fraction(0)] * 5, [Fraction(0)] * 5, [Fraction(0)] * 5
    for delta in deltas:
        before = sums.exponents.tolist()
        add(sums, delta, log=False)
        for k, (old, new, x) in enumerate(zip(before, sums.exponents.tolist(), delta.tolist(), strict=True)):
            exact[k] += Fraction(x)
            allowed[k] += Fraction(2) ** new * (Fraction(1, 2) if old == new else 1)
            largest[k] = max(largest[k], abs(Fraction(x)), abs(exact[k]))
    held = exactly(sums)
    eps = Fraction(2) ** (-52 if dtype == torch.float64 else -39)
    for got, total, most, size in zip(held, exact, allowed, largest, strict=True):
        assert abs(got - total) <= most
        assert abs(got - total) <= len(deltas) * eps * size
    # the value is the integer sum, rounded to the working precision and then to the dtype
    expected = torch.tensor([float(x) for x in held], dtype=torch.float64).to(dtype)
    finite = expected.isfinite()
    # rounding twice (integer to float32 to 16 bits) may be one unit off
    torch.testing.assert_close(sums.value()[finite], expected[finite], rtol=2 * torch.finfo(dtype).eps, atol=1e-44)


# Measured, worst element, in units of eps times its sum: float32 exactly 0 (its 24 bits are all above the quantum);
# float64 0.02 over 200 additions, and 3 over 2,000, by when every quantum is wider than the first contribution's.
@pytest.mark.parametrize(
    ("dtype", "number", "relative"),
    [(torch.float32, 2000, 0.0), (torch.float64, 200, 0.05), (torch.float64, 2000, 5.0)],
    ids=str,
)
def test_the_quantum_is_far_below_the_first_contribution(dtype: torch.dtype, number: int, relative: float) -> None:
    deltas = torch.rand(number, 7, dtype=dtype) + 0.5
    sums = Accumulator(torch.zeros(7, dtype=dtype))
    for delta in deltas:
        add(sums, delta)
    for held, column in zip(exactly(sums), deltas.T, strict=True):
        truth = sum(map(Fraction, column.tolist()))
        assert abs(held - truth) <= relative * torch.finfo(dtype).eps * truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_elements_beside_large_ones_are_held_as_exactly(dtype: torch.dtype) -> None:
    """The same numbers in rows scaled by 2^0 to 2^-90: the same value, whatever is beside it."""
    rows, number = 2.0 ** -torch.arange(0, 91, 6, dtype=dtype)[:, None], 300
    deltas = torch.randn(number, 4, dtype=dtype)
    together, alone = Accumulator(torch.zeros(len(rows), 4, dtype=dtype)), Accumulator(torch.zeros(4, dtype=dtype))
    for delta in deltas:
        add(together, rows * delta)
        add(alone, delta)
    assert torch.equal(together.value(), rows * alone.value())
    truth = [sum(map(Fraction, column.tolist())) for column in deltas.T]
    for row, scale in zip(together.value(), rows, strict=True):
        for got, exact, column in zip(row.tolist(), truth, deltas.T, strict=True):
            most = float(column.cumsum(0).abs().max())
            # one rounding of the value; what the additions lose was measured as 0 beside it
            assert abs(Fraction(got) / Fraction(float(scale)) - exact) <= torch.finfo(dtype).eps * Fraction(most)
    for delta in deltas.flip(0):
        assert together.subtract(rows * delta)
    assert not bool(together.data.any())


def test_where_large_parts_cancel_their_quantum_remains() -> None:
    """The documented limit: later small contributions are held to the quantum of the large ones."""
    sums, small = Accumulator(torch.zeros(2)), torch.tensor([2.0**-20, 2.0**-20])
    add(sums, torch.tensor([2.0**22, 0.0]))
    add(sums, torch.tensor([-(2.0**22), 0.0]))
    add(sums, small)
    add(sums, small)
    quantum = 2.0 ** float(sums.exponents[0])
    assert quantum == 2.0**-17  # 40 bits under 2^23
    assert sums.value().tolist() == [0.0, 2.0**-19]
    for delta in (small, small, torch.tensor([-(2.0**22), 0.0]), torch.tensor([2.0**22, 0.0])):
        assert sums.subtract(delta)
    assert sums.value().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_subnormal_numbers_are_exact(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    sums = Accumulator(torch.zeros(3, dtype=dtype))
    deltas = [torch.tensor([1, -3, 2**20 + 1], dtype=dtype) * least for _ in range(5)]
    deltas.append(torch.tensor([0.0, 1.0, least], dtype=dtype))
    for delta in deltas[:-1]:
        add(sums, delta)
    assert exactly(sums) == [5 * k * Fraction(least) for k in (1, -3, 2**20 + 1)]
    assert sums.value().tolist() == [5 * least, -15 * least, 5 * (2**20 + 1) * least]
    add(sums, deltas[-1])
    assert sums.value().tolist() == [5 * least, 1.0, (5 * (2**20 + 1) + 1) * least]
    for delta in reversed(deltas):
        assert sums.subtract(delta)
    assert exactly(sums) == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@given(data=st.data())
def test_another_delta_is_noticed_in_the_first_chunk_too(dtype: torch.dtype, data: st.DataObject) -> None:
    """No shift on the way back hides it: the sum does not come back to zero, or says that it cannot."""
    later = data.draw(contributions(dtype))
    first = torch.randn(SHAPE, dtype=dtype) * 2.0 ** data.draw(st.integers(-90, 90))
    wrong = first.clone()
    place = data.draw(st.integers(0, 4))
    wrong[place] = data.draw(
        st.sampled_from(
            [
                float(torch.nextafter(first[place], first.new_tensor(torch.inf))), 0.0, -float(first[place]),
                2 * float(first[place]), torch.nan, torch.inf, torch.finfo(dtype).max,
            ]
        )
    )  # fmt: skip
    sums = Accumulator(torch.zeros(SHAPE, dtype=dtype))
    nothing = standing(sums)
    for delta in (first, *later):
        add(sums, delta)
    for delta in reversed(later):
        assert sums.subtract(delta)
    assert not sums.subtract(wrong) or standing(sums) != nothing


def test_a_float_sum_would_drift() -> None:
    """The same additions in float32 do not come back: this is what the accumulator is for."""
    deltas = torch.rand(512, 100)
    drifting, sums = torch.zeros(100), Accumulator(torch.zeros(100))
    for delta in deltas:
        drifting = drifting + delta
        add(sums, delta)
    for delta in deltas.flip(0):
        drifting = drifting - delta
        sums.subtract(delta)
    assert not torch.equal(drifting, torch.zeros(100))
    assert torch.equal(sums.value(), torch.zeros(100))


# Measured: 6e-8 in float32, 1e-16 in float64, 4e-3 in bfloat16: the last rounding.
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-7), (torch.float64, 3e-16), (torch.bfloat16, 5e-3)], ids=str
)
def test_growth_by_two_to_the_sixty_is_logged_and_undone(dtype: torch.dtype, relative: float) -> None:
    sums = Accumulator(torch.zeros(64, dtype=dtype))
    deltas = [(torch.rand(64) * 2.0**k).to(dtype) for k in range(0, 61, 2)]
    seen = []
    for delta in deltas:
        seen.append(standing(sums))
        add(sums, delta)
    # The first widening logs a scale for each. A later one logs its place (4 bytes), its scale and what fell off: at
    # least 20 bits of growth in float32 (4 bytes), 7 in float64 (2).
    scale, times, fallen = (8, -(-60 // 7), 2) if dtype == torch.float64 else (2, -(-60 // 20), 4)
    assert sums.nbytes <= 64 * (held_bytes(dtype) + scale + times * (4 + scale + fallen))
    torch.testing.assert_close(sums.value().double(), sum(d.double() for d in deltas), rtol=relative, atol=0)
    for delta in reversed(deltas):
        assert sums.subtract(delta)
        assert standing(sums) == seen.pop()


def test_only_what_outgrows_its_quantum_is_logged() -> None:
    sums = Accumulator(torch.zeros(1000))
    add(sums, torch.ones(1000))
    assert sums.nbytes == 1000 * 10 + 2 + 1  # where all are the same, one scale is logged, and one byte: nothing fell
    jump = torch.zeros(1000)
    jump[[3, 500]] = 2.0**30
    add(sums, jump)
    # two places (4 bytes), the one scale that both had, and what fell off both (31 bits under 2^40)
    assert sums.nbytes == 1000 * 10 + 3 + 2 * 4 + 2 + 1
    assert exactly(sums)[:5] == [1, 1, 1, 2**30 + 1, 1]


def test_a_jump_by_two_to_the_two_hundred() -> None:
    sums = Accumulator(torch.zeros(3))
    small, large = torch.tensor([1e-30, -3e-31, 0.0]), torch.tensor([1e30, -1e30, 0.0])
    add(sums, small)
    before = standing(sums)
    add(sums, large)
    torch.testing.assert_close(sums.value(), large, rtol=1e-7, atol=0)
    sums.subtract(large)
    assert standing(sums) == before
    torch.testing.assert_close(sums.value(), small, rtol=1e-6, atol=0)


def test_many_additions_near_the_limit_never_wrap() -> None:
    sums = Accumulator(torch.zeros(2))
    add(sums, torch.tensor([1.0, -1.0]))
    for _ in range(40):
        add(sums, torch.tensor([2.0**19, -(2.0**19)]))
        assert int(sums.data.abs().max()) <= 1 << 62
    torch.testing.assert_close(sums.value(), torch.tensor([40 * 2.0**19 + 1, -40 * 2.0**19 - 1]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_only_a_non_finite_contribution_is_refused(bad: float) -> None:
    sums = Accumulator(torch.zeros(3))
    name = "NaN" if bad != bad else "infinity"
    with pytest.raises(NonFiniteError, match=f"holds an? {name}"):
        add(sums, torch.tensor([1.0, bad, 0.0]))
    with pytest.raises(NonFiniteError, match=name):
        Accumulator(torch.tensor([bad]))
    # the largest numbers there are: their sum is infinite in float32, and still comes back
    for _ in range(3):
        add(sums, torch.full((3,), 3e38))
    assert bool(sums.value().isinf().all())


def test_a_contribution_too_large_for_the_sums_own_type_is_refused() -> None:
    sums = Accumulator(torch.zeros(2))
    with pytest.raises(NonFiniteError, match="infinity"):
        add(sums, torch.tensor([1e300, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sum_beyond_all_numbers_of_its_type_comes_back_or_is_refused(dtype: torch.dtype) -> None:
    sums, most = Accumulator(torch.zeros(1, dtype=dtype)), torch.full((1,), torch.finfo(dtype).max, dtype=dtype)
    for _ in range(500):
        add(sums, most)
    assert sums.value().isinf().all()
    assert exactly(sums) == [500 * Fraction(torch.finfo(dtype).max)]
    if dtype == torch.float64:  # no quantum can be wider than 2^971
        for _ in range(12):  # 512 in all, of 2^53 steps each
            add(sums, most)
        with pytest.raises(NonFiniteError, match="far beyond the largest number"):
            add(sums, most)
    else:
        for _ in range(500):
            assert sums.subtract(most)
        assert sums.value().item() == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_sums_are_two_real_ones(dtype: torch.dtype) -> None:
    sums, real = Accumulator(torch.zeros(5, dtype=dtype)), Accumulator(torch.zeros(5, 2, dtype=dtype.to_real()))
    deltas = [torch.randn(5, dtype=dtype) * 2.0 ** (7 * k) for k in range(9)]
    deltas[3] = deltas[3].conj()
    for delta in deltas:
        add(sums, delta)
        add(real, torch.view_as_real(delta.resolve_conj()))
        assert torch.equal(torch.view_as_real(sums.value()), real.value())
    assert sums.value().dtype == dtype
    add(sums, torch.ones(5))  # a real contribution
    assert sums.subtract(torch.ones(5))
    for delta in reversed(deltas):
        assert sums.subtract(delta)
    assert torch.equal(sums.value(), torch.zeros(5, dtype=dtype))
    with pytest.raises(NonFiniteError, match="NaN"):
        add(sums, torch.complex(torch.ones(5), torch.full((5,), torch.nan)))


# what the sum's own type rounds is rounded once, when the value is read: 16-bit sums gather in float32
@pytest.mark.parametrize(
    ("of", "added", "truth"),
    [
        (torch.float32, torch.float64, 1 + 2.0**-23),
        (torch.bfloat16, torch.float32, 1 + 2.0**-7),
        (torch.float16, torch.float32, 1 + 2.0**-10),
    ],
    ids=str,
)
def test_contributions_of_a_wider_type(of: torch.dtype, added: torch.dtype, truth: float) -> None:
    sums, parts = Accumulator(torch.ones(1, dtype=of)), [torch.full((1,), (truth - 1) / 4, dtype=added)] * 4
    for part in parts:
        add(sums, part)
    assert sums.value().dtype == of
    assert sums.value().item() == truth
    for part in parts:
        assert sums.subtract(part)
    assert sums.value().item() == 1


def test_integer_contributions_to_a_floating_sum() -> None:
    sums = Accumulator(torch.zeros(2))
    for delta in (torch.tensor([3, -2]), torch.tensor([True, False]), torch.tensor([200, 7], dtype=torch.uint8)):
        add(sums, delta)
    assert sums.value().tolist() == [204.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_narrow_integers_wrap_and_come_back(dtype: torch.dtype) -> None:
    sums, delta = Accumulator(torch.tensor([100], dtype=dtype)), torch.tensor([100], dtype=dtype)
    for _ in range(700):
        add(sums, delta)
    assert sums.value().item() == torch.tensor(70100).to(dtype).item()
    for _ in range(700):
        sums.subtract(delta)
    assert sums.value().item() == 100


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128, torch.int64, torch.int32], ids=str)
def test_kept_bytes_are_those_of_a_snapshot(dtype: torch.dtype) -> None:
    data, scales, _, _ = Accumulator(torch.ones(3, 4).to(dtype)).snapshot()
    assert kept_bytes(torch.Size([3, 4]), dtype) == data.nbytes + scales.nbytes


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_integer_sums_are_exact_counters(dtype: torch.dtype) -> None:
    sums = Accumulator(torch.tensor([3, -4], dtype=dtype))
    add(sums, torch.tensor([10, 1]))
    add(sums, torch.tensor([True, False]))
    assert sums.value().tolist() == [14, -3]
    assert sums.value().dtype == dtype
    sums.subtract(torch.tensor([True, False]))
    sums.subtract(torch.tensor([10, 1]))
    assert sums.value().tolist() == [3, -4]
    assert sums.value().dtype == dtype


def test_an_empty_sum_and_a_broadcast_contribution() -> None:
    empty = Accumulator(torch.zeros(2, 0))
    add(empty, torch.zeros(2, 0))
    assert empty.value().shape == (2, 0)
    sums = Accumulator(torch.zeros(2, 3))
    add(sums, torch.ones(1, 3).expand(2, 3))
    assert torch.equal(sums.value(), torch.ones(2, 3))


def test_a_snapshot_stands_where_it_was_taken() -> None:
    sums = Accumulator(torch.zeros(4))
    for k in range(5):
        add(sums, torch.rand(4) * 2.0 ** (8 * k), log=False)
    snapshot = sums.snapshot()
    snapshot = snapshot._replace(data=snapshot.data.clone())  # the scales are replaced, not written to
    there, more = standing(sums), torch.rand(4) * 2.0**50
    add(sums, more, log=False)
    onward = standing(sums)
    sums.restore(snapshot._replace(data=snapshot.data.clone()))
    assert standing(sums) == there
    add(sums, more, log=False)
    assert standing(sums) == onward


def test_the_value_does_not_change_until_the_sum_does() -> None:
    sums = Accumulator(torch.ones(2))
    assert sums.value() is sums.value()
    before = sums.value()
    add(sums, torch.ones(2), log=False)
    assert before.tolist() == [1.0, 1.0]
    assert sums.value().tolist() == [2.0, 2.0]


def test_another_delta_in_the_first_chunk_is_refused_by_name() -> None:
    class Forgetful(LinearAttention):
        """Adds something else when it sees the first chunk again."""

        def _attend(self, inputs: Tensor, state: dict[str, PrefixSum]) -> tuple:
            if bool(inputs[0, 0] == 12):
                times.append(1)
            if len(times) == 2:  # through .data: no version tells of it
                self.qkv.bias.data[-1] += 1e-3
            return super()._attend(inputs, state)

    model, times = Forgetful(), []
    tokens = torch.randint(0, 12, (1, 40))
    tokens[0, 0] = 12
    with pytest.raises(StateMismatchError, match=r"\['sums'\], tokens 0 to 7"):
        backward(model, tokens, chunk=8)


def test_kept_copies_share_the_quanta_that_did_not_change() -> None:
    store = Store("device", 8)
    carrier = SumCarrier(Setting(0, "s", False, 5, store), PrefixSum(torch.zeros(64)))
    tokens, held = [], []
    for position, size in enumerate([1.0, 1.0, 1.0, 2.0**39, 1.0]):
        bound = carrier.bind(Span(position, position + 1), Purpose.FORWARD)
        carrier.take(bound.advance(torch.full((64,), size))[1])
        look = carrier.look()
        carrier.seen(None if look is None else int(look))
        carrier.settle()
        tokens.append(carrier.keep(store, whole=False))
        held.append(carrier.nbytes)
    assert held == [640, 640, 640, 640 + 128, 640 + 128]  # the live ones, and those of the first three copies
    values = [1, 2, 3, 2**39 + 3, 2**39 + 4]
    for position, (token, value) in enumerate(zip(tokens, values, strict=True)):
        carrier.load(store, token, position + 1)
        assert exactly(carrier.accumulator) == [value] * 64
        assert carrier.position == position + 1
    for token in tokens[:3]:
        carrier.drop(store, token)
    del tokens, token
    carrier.load(store, carrier.keep(store, whole=False), 5)
    assert carrier.nbytes == 640
