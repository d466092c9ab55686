"""Additions that nobody has looked at yet: they cost no synchronisation, and are repaired or taken back to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad import NonFiniteError
from slimgrad.states.accumulator import Accumulator
from tests.states.test_accumulator import add, contributions

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
# of the sum, of the contributions
PAIRS = [*((dtype, dtype) for dtype in FLOATING), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
SYNCHRONISES = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "item"}


def everything(sums: Accumulator) -> Any:
    """All that the sum is, in Python's numbers."""
    return in_numbers(sums.state())


def in_numbers(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, list(x.shape), x.tolist()
    if isinstance(x, dict):
        return {key: in_numbers(value) for key, value in x.items()}
    return [in_numbers(each) for each in x] if isinstance(x, list) else x


@st.composite
def chunks(draw: st.DrawFn, dtype: torch.dtype) -> list[Tensor]:
    """Contributions of all sizes, of complex numbers too."""
    deltas = draw(contributions(dtype.to_real()))
    return [torch.complex(x, x.flip(0)) for x in deltas] if dtype.is_complex else deltas


class Watched(TorchDispatchMode):
    """Notes the names of all operations, and runs out of memory at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.fails_at = fails_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        if len(self.seen) - 1 == self.fails_at:
            raise MemoryError
        return func(*args, **(kwargs or {}))

    @property
    def synchronises(self) -> set[str]:
        return SYNCHRONISES.intersection(self.seen)


@pytest.mark.parametrize(("of", "added"), PAIRS, ids=str)
@given(data=st.data())
def test_what_was_added_in_vain_is_repaired(of: torch.dtype, added: torch.dtype, data: st.DataObject) -> None:
    deltas = data.draw(chunks(added))
    sums, asked = Accumulator(torch.zeros(5, dtype=of)), Accumulator(torch.zeros(5, dtype=of))
    past = []
    for delta in deltas:
        past.append(everything(sums))
        sums.add(delta)
        asked.add(delta)
        looks, pending = sums.looks(), sums.data.clone()
        assert looks is not None
        assert sums.settle(int(looks)) == (not torch.equal(sums.data, pending))
        assert int(sums.data.abs().max()) <= 1 << 62
        assert sums.looks() is None
        settled = sums.data.clone()
        assert not sums.settle(int(looks))  # once is enough
        assert torch.equal(sums.data, settled)
        sums.done(log=True)
        assert torch.equal(sums.value(), asked.value())  # the same where nobody fetched the number
        asked.done(log=True)
        assert everything(sums) == everything(asked)
    for delta in reversed(deltas):
        assert sums.subtract(delta)
        before, now = past.pop(), everything(sums)
        before.pop("bound"), now.pop("bound")  # the way back does not look
        assert now == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_a_jump_by_two_to_the_hundred(dtype: torch.dtype) -> None:
    sums, small = Accumulator(torch.zeros(7, dtype=dtype)), torch.rand(7, dtype=dtype) + 0.5
    add(sums, small)
    value, before = sums.value(), everything(sums)
    large = small * 2.0**100
    sums.add(large)
    assert sums.settle()
    assert torch.equal(sums.value(), large)  # the small one is under its last place
    sums.undo()
    assert everything(sums) == before
    add(sums, large)
    assert sums.subtract(large)
    assert torch.equal(sums.value(), value)
    assert sums.subtract(small)
    assert not bool(sums.data.any())


def test_growth_is_repaired_only_where_it_must_be() -> None:
    """From 2^39 steps, which 1 has after the first, to 2^62: the second repair is there, and no sooner."""
    sums, repaired = Accumulator(torch.zeros(3)), []
    for k in range(48):
        sums.add(torch.full((3,), 2.0**k))
        looks = sums.looks()
        assert looks is not None
        if sums.settle(int(looks)):
            repaired.append(k)
        sums.done(log=True)
    assert repaired == [0, 23, 46]
    assert sums.value().tolist() == [2.0**48] * 3


def test_where_there_is_room_after_all_nothing_is_repaired() -> None:
    """Up and down by 2^59 steps: what bounds the sum without looking at it grows to 2^62, the sum does not."""
    sums, looked = Accumulator(torch.ones(3)), []
    for k in range(20):
        sums.add(torch.full((3,), 2.0**20 * (-1) ** k))
        looks, pending = sums.looks(), sums.data.clone()
        assert looks is not None
        seen = int(looks)
        with Watched() as settling:
            assert not sums.settle(seen)
        assert torch.equal(sums.data, pending)
        if settling.synchronises:
            looked.append(k)
        sums.done(log=True)
    assert looked == [7, 13, 19]  # 8 times 2^59; then 6 times on top of what stands and the one that comes
    assert everything(sums)["log"] == []
    assert sums.value().tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_number_to_fetch_holds_the_bits_of_the_largest_step(dtype: torch.dtype) -> None:
    least = 2.0**-149 if dtype == torch.float32 else 5e-324
    sums = Accumulator(torch.zeros(3, dtype=dtype))
    sums.add(torch.tensor([1.0, -7.0, 2.0], dtype=dtype) * least)
    looks = sums.looks()
    assert looks is not None
    assert (looks.shape, looks.dtype) == (torch.Size([]), torch.int64)
    expected = torch.tensor(7.0, dtype=dtype).view(torch.int32 if dtype == torch.float32 else torch.int64)
    assert int(looks) == int(expected)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64, torch.int32], ids=str)
def test_an_addition_does_not_wait_for_the_device(dtype: torch.dtype) -> None:
    sums, delta = Accumulator(torch.zeros(5, dtype=dtype)), torch.arange(1, 6).to(dtype)
    for widens in (dtype in FLOATING, False, False):
        with Watched() as adding:
            sums.add(delta)
            looks = sums.looks()
        assert adding.seen
        assert not adding.synchronises
        seen = None if looks is None else int(looks)
        with Watched() as settling:
            assert sums.settle(seen) == widens
            sums.done(log=True)
        assert bool(settling.synchronises) == widens
    for narrows in (False, False, dtype in FLOATING):
        with Watched() as subtracting:
            assert sums.subtract(delta)
        assert bool(subtracting.synchronises) == narrows
    sums.add(delta)
    with Watched() as asking:  # and what looks by itself is seen to
        sums.settle()
    assert bool(asking.synchronises) == (dtype in FLOATING)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_steps_beyond_all_integers_are_taken_back(dtype: torch.dtype) -> None:
    """Under the finest quantum minus one has infinitely many steps; added to a negative number, int64 wraps."""
    sums = Accumulator(torch.zeros(3, dtype=dtype))
    finest = -(2.0**-149) if dtype.to_real() != torch.float64 else -5e-324
    few = torch.tensor([3.0, 1.0, 2.0], dtype=dtype.to_real()).to(dtype) * finest
    if dtype == torch.float16 or dtype == torch.bfloat16:  # too narrow for steps of the finest quantum
        few = torch.tensor([3.0, 1.0, 2.0]) * finest
    sums.add(few)
    assert not sums.settle()
    sums.done(log=True)
    before = everything(sums)
    assert sums.data.min() == -3
    sums.add(torch.full((3,), -1.0, dtype=dtype))
    assert int(sums.data.max()) > 1 << 62
    sums.undo()
    assert everything(sums) == before
    sums.add(torch.full((3,), -1.0, dtype=dtype))
    assert sums.settle()
    assert sums.value().tolist() == [-1.0] * 3
    sums.undo()
    assert everything(sums) == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_is_not_finite_is_refused_when_it_is_looked_at(dtype: torch.dtype, bad: float) -> None:
    sums = Accumulator(torch.zeros(4, dtype=dtype))
    good, wrong = torch.arange(1, 5).to(dtype), torch.tensor([1.0, bad, 0.0, 2.0]).to(dtype)
    add(sums, good)
    before = everything(sums)
    for told in (True, False):
        sums.add(wrong)
        looks = sums.looks()
        assert looks is not None
        with pytest.raises(NonFiniteError, match="NaN" if bad != bad else "infinity"):
            sums.settle(int(looks)) if told else sums.value()
        assert everything(sums) == before
        sums.undo()
        assert everything(sums) == before
    sums.add(wrong)
    with pytest.raises(NonFiniteError):
        sums.done(log=False)
    sums.done(log=False)  # of the refused one nothing is dropped: it logged nothing
    assert everything(sums) == before
    add(sums, good)
    for _ in range(2):
        assert sums.subtract(good)
    assert not bool(sums.data.any())


def test_beyond_all_numbers_is_refused_with_the_sum_as_it_was() -> None:
    sums, most = Accumulator(torch.zeros(1, dtype=torch.float64)), torch.full((1,), 1.7e308, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="far beyond"):  # noqa: PT012
        for _ in range(1000):
            before = everything(sums)
            add(sums, most)
    before.pop("bound"), (after := everything(sums)).pop("bound")  # it has been looked at, and is exact now
    assert after == before
    sums.undo()
    assert sums.subtract(most)


@pytest.mark.parametrize(("of", "added"), [*PAIRS, (torch.int64, torch.int64), (torch.uint8, torch.int64)], ids=str)
@pytest.mark.parametrize("settled", [False, True])
def test_an_addition_is_taken_back(of: torch.dtype, added: torch.dtype, settled: bool) -> None:
    """The first, which widens all quanta, one that widens none, and one that widens some."""
    sums, written = Accumulator(torch.zeros(4, dtype=of)), torch.tensor([1, 2, 3, 200]).to(added)
    growing = written.clone()
    if of in FLOATING:
        growing[1] *= 2.0**12 if torch.float16 in (of, added) else 2.0**40
    for delta in (written, written, growing, written):
        before, copy = everything(sums), delta.clone()
        for _ in range(2):
            sums.add(delta)
            delta.zero_()  # as a model may
            if settled:
                sums.settle()
            sums.undo()
            assert everything(sums) == before
            sums.undo()
            assert everything(sums) == before
            delta.copy_(copy)
        add(sums, delta)
        assert everything(sums) != before
        now = everything(sums)
        sums.undo()  # it is done
        assert everything(sums) == now
        sums.add(written)
        assert sums.subtract(written)
        sums.undo()  # and here it is subtracted
        assert everything(sums)["data"] == now["data"]
    for delta in (written, growing, written, written):
        assert sums.subtract(delta)
    assert not bool(sums.data.any())


def test_the_copy_is_held_until_the_chunk_is_done() -> None:
    sums, held = Accumulator(torch.zeros(1000)), 1000 * 10
    assert sums.nbytes == held
    for log in (False, True):
        sums.add(torch.ones(1000, dtype=torch.bfloat16))
        assert sums.nbytes == held + 2000
        assert sums.settle() == (not log)  # the first
        assert sums.nbytes == held + 2000 + (0 if log else 3)
        sums.done(log=log)
        assert sums.nbytes == held
    sums.add(torch.ones(1000))
    sums.undo()
    assert sums.nbytes == held


def test_without_a_log_only_the_last_one_is_forgotten() -> None:
    sums, one = Accumulator(torch.zeros(2)), torch.ones(2)
    add(sums, one)
    logged = everything(sums)["log"]
    assert len(logged) == 1
    sums.done(log=False)  # a chunk that added nothing
    add(sums, one, log=False)
    assert everything(sums)["log"] == logged
    add(sums, one * 2.0**40, log=False)
    assert everything(sums)["log"] == logged
    add(sums, one * 2.0**80)
    assert len(everything(sums)["log"]) == 2


def test_what_was_not_settled_is_settled_by_whatever_comes_next() -> None:
    one = torch.tensor([1.0, 2.0])
    nexts: list[Callable[[Accumulator], Any]] = [
        Accumulator.value, Accumulator.snapshot, Accumulator.state, lambda sums: sums.done(log=True),
        lambda sums: sums.add(torch.zeros(2)), lambda sums: sums.subtract(torch.zeros(2)),
    ]  # fmt: skip
    for go_on in nexts:
        sums = Accumulator(torch.zeros(2))
        sums.add(one)
        go_on(sums)
        assert int(sums.data.abs().max()) == 1 << 39  # not what int64 makes of infinitely many
        assert sums.value().tolist() == [1.0, 2.0]


def test_coming_back_to_a_snapshot_drops_what_is_pending() -> None:
    sums = Accumulator(torch.ones(3))
    before, snapshot = everything(sums), sums.snapshot()
    snapshot = snapshot._replace(data=snapshot.data.clone())
    sums.add(torch.full((3,), torch.nan))
    sums.restore(snapshot)
    assert sums.looks() is None
    sums.undo()
    assert everything(sums) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int32], ids=str)
def test_sums_without_elements_have_nothing_to_look_at(dtype: torch.dtype) -> None:
    sums = Accumulator(torch.zeros(2, 0, dtype=dtype))
    sums.add(torch.zeros(2, 0, dtype=dtype))
    assert sums.looks() is None
    assert not sums.settle()
    sums.undo()
    add(sums, torch.zeros(2, 0, dtype=dtype))
    assert sums.subtract(torch.zeros(2, 0, dtype=dtype))
    assert sums.value().shape == (2, 0)


def written_and_read(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64, torch.uint8], ids=str)
@given(data=st.data())
def test_a_state_that_was_read_goes_on_and_back_to_the_same_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    deltas = data.draw(chunks(dtype if dtype in FLOATING else torch.float16))
    deltas = [delta.to(dtype) for delta in deltas]
    place = data.draw(st.integers(0, len(deltas)))
    sums, read = Accumulator(torch.zeros(5, dtype=dtype)), Accumulator(torch.ones(5, dtype=dtype))
    past = []
    for k, delta in enumerate([*deltas, torch.zeros(5, dtype=dtype)]):
        if k == place:
            state = written_and_read(sums.state())
            read.add(torch.ones(5, dtype=dtype))
            read.load_state(state)
            read.undo()  # nothing of before is left
            assert everything(read) == in_numbers(state) == everything(sums)
        past.append(everything(sums))
        add(sums, delta)
        if k >= place:
            add(read, delta)
            assert everything(read) == everything(sums)
            assert torch.equal(read.value(), sums.value())
    for delta in reversed([*deltas, torch.zeros(5, dtype=dtype)]):
        assert read.subtract(delta)
        now, before = everything(read), past.pop()
        now.pop("bound"), before.pop("bound")
        assert now == before


def test_a_state_is_whole_and_takes_no_more_than_it_must() -> None:
    sums = Accumulator(torch.zeros(1000))
    add(sums, torch.rand(1000) + 1)
    jump = torch.zeros(1000)
    jump[[3, 500]] = 2.0**30
    add(sums, jump)
    state = sums.state()
    tensors = [x for x in (*state.values(), *(x for entry in state["log"] for x in entry)) if isinstance(x, Tensor)]
    assert len(tensors) == 2 + 2 + 3  # the first widening is of all places
    assert sum(x.untyped_storage().nbytes() for x in tensors) == sum(x.nbytes for x in tensors) == sums.nbytes
    # what is read stands on its own
    read = Accumulator(torch.zeros(1000))
    read.load_state(state)
    before = everything(sums)
    add(read, jump)
    assert read.subtract(jump)
    assert read.subtract(jump)
    assert everything(sums) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.int64], ids=str)
def test_an_allocation_that_fails_leaves_the_sum_to_be_told_back(dtype: torch.dtype) -> None:
    """At each operation of an addition, of its repair and of the way back; the second time it succeeds."""
    sums, first = Accumulator(torch.zeros(4, dtype=dtype)), torch.tensor([1, 2, 3, 4]).to(dtype)
    add(sums, first)
    before, grown = everything(sums), first.clone()
    grown[1] *= 2**40

    def chunk(mode: Watched) -> None:
        with mode:
            sums.add(grown)
            sums.settle()

    chunk(whole := Watched())
    after = everything(sums)
    with Watched() as undoing:
        sums.undo()
    assert len(whole.seen) > (20 if dtype != torch.int64 else 2)
    for k in range(len(whole.seen)):
        with pytest.raises(MemoryError):
            chunk(Watched(k))
        sums.undo()
        assert everything(sums) == before
    for k in range(len(undoing.seen)):
        chunk(Watched())
        assert everything(sums) == after
        with pytest.raises(MemoryError), Watched(k):
            sums.undo()
        sums.undo()
        assert everything(sums) == before
