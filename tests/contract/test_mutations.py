"""The contract can fail: each classical mistake, planted in the real code, is found by the contract's own check.

A mistake shows as a gradient that is off (AssertionError), or is refused on the way (SlimgradError).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor

import slimgrad as sg
from slimgrad import api
from slimgrad.call import model as shared
from slimgrad.call import outputs
from slimgrad.call.additive import SumCheck
from slimgrad.call.arguments import Call
from slimgrad.call.losses import token_cross_entropy
from slimgrad.call.program import ChunkProgram, Collected
from slimgrad.call.source import Piece, SequenceData
from slimgrad.gradients.buffers import Gather
from slimgrad.states import accumulator
from slimgrad.states.accumulator import Accumulator
from slimgrad.states.rows import RowsCarrier
from slimgrad.states.sums import SumCarrier
from slimgrad.states.tensors import TensorCarrier
from slimgrad.sweep import program
from slimgrad.sweep.cut import Cut, Span
from slimgrad.sweep.progress import Progress
from slimgrad.sweep.witness import Witness
from tests.contract import contract
from tests.contract.cases import CASES, shortened, tokens
from tests.toy_models import GatedRecurrence

CHUNK = 9
build = dict(CASES)


def test_a_cut_state_gradient_of_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorCarrier, "roots", lambda self: [])
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["gated"], chunk=CHUNK)


def test_a_cut_state_gradient_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SumCarrier, "roots", lambda self: [])
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["linear attention"], chunk=CHUNK)


def test_a_cut_state_gradient_of_growing_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowsCarrier, "add_gradient", lambda self, g, first=0: None)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["cached"], chunk=CHUNK)


def test_gradients_of_a_window_added_to_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    add_gradient = RowsCarrier.add_gradient
    monkeypatch.setattr(RowsCarrier, "add_gradient", lambda self, g, first=0: add_gradient(self, g, 0))
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["window in a cache"], chunk=CHUNK)


def test_a_cut_gradient_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "expect", lambda self, final_gradient: None)
    with pytest.raises(AssertionError, match="off by"):
        contract.check_carried(build["all kinds"], cuts=[58], chunks=[CHUNK, CHUNK])


def test_the_target_at_a_chunk_edge_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    read = SequenceData.read

    def off_by_one(self: SequenceData, start: int, stop: int, *, targets: bool) -> Piece:
        piece = read(self, start, stop, targets=targets)
        if piece.targets is None:
            return piece
        without = piece.targets.clone()
        without[:, -1] = -100
        return piece._replace(targets=without)

    monkeypatch.setattr(SequenceData, "read", off_by_one)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["all kinds"], chunk=CHUNK)


@pytest.mark.parametrize("step", [-1, 1], ids=["a token twice", "a token skipped"])
def test_the_input_at_a_chunk_edge(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    read = ChunkProgram.read

    def off_by_one(self: ChunkProgram, span: Span, *, head: bool) -> program.Piece:
        start = span.start + step if span.start else 0
        return read(self, Span(start, span.stop), head=head)

    monkeypatch.setattr(ChunkProgram, "read", off_by_one)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["signals"], chunk=CHUNK)


def test_a_mean_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean of the chunk, weighed as if every chunk were full and every target counted."""
        return token_cross_entropy(outputs, targets).sum() / (targets != -100).sum() * 2 * CHUNK

    monkeypatch.setattr(api, "cross_entropy_sum", mean)
    with pytest.raises(sg.InputError, match="the mean over its chunk"):
        contract.check(build["gated"], chunk=CHUNK)
    monkeypatch.setattr(SumCheck, "require", lambda *args: None)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["gated"], chunk=CHUNK)


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Binomial(3)], ids=["Rebuild", "Binomial"])
@pytest.mark.parametrize("way", ["backward", "loss"])
def test_a_draw_not_replayed(monkeypatch: pytest.MonkeyPatch, way: str, schedule: sg.Schedule) -> None:
    monkeypatch.setattr(shared, "seeded", lambda seed, device: nullcontext())
    with pytest.raises(sg.StateMismatchError, match=r"state \['h'\], tokens \d+ to \d+: rebuilt with other bits"):
        contract.check_draws(GatedRecurrence().double(), tokens(), chunk=CHUNK, schedule=schedule, way=way)


def test_a_draw_not_replayed_and_the_bits_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "seeded", lambda seed, device: nullcontext())
    monkeypatch.setattr(Witness, "agrees", lambda self, name, position, number: True)
    with pytest.raises(AssertionError, match="off by"):
        contract.check_draws(GatedRecurrence().double(), tokens(), chunk=CHUNK)


@pytest.mark.parametrize("schedule", [sg.Rebuild(), sg.Keep()], ids=["Rebuild", "Keep"])
def test_an_accumulator_that_wraps(monkeypatch: pytest.MonkeyPatch, schedule: sg.Schedule) -> None:
    # integers that wrapped come back to the same bits: no checksum sees it, and Rebuild still equals Keep
    monkeypatch.setattr(accumulator, "_LIMIT", 2.0**300)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["growing sums"], chunk=CHUNK, schedule=schedule)


def test_a_widening_whose_bits_are_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Accumulator.done
    monkeypatch.setattr(Accumulator, "done", lambda self, *, log: done(self, log=False))
    with pytest.raises((AssertionError, sg.StateMismatchError), match=r"off by|other bits"):
        contract.check(build["growing sums"], chunk=CHUNK, schedule=sg.Rebuild())


def test_fallen_steps_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quanta come back, the steps that a widening dropped do not."""
    widen = Accumulator._widen

    def forgetful(self: Accumulator, *args: Any, **kwargs: Any) -> None:
        widen(self, *args, **kwargs)
        if self._log:
            self._log[-1] = self._log[-1]._replace(fallen=self._log[-1].fallen.new_zeros(1))

    monkeypatch.setattr(Accumulator, "_widen", forgetful)
    with pytest.raises(sg.StateMismatchError, match="other bits"):
        contract.check(build["growing sums"], chunk=CHUNK, schedule=sg.Rebuild())


def test_one_quantum_for_a_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # small elements vanish in both sweeps alike: no checksum sees it
    widen = Accumulator._widen

    def all_as_the_largest(self: Accumulator, coming: Tensor, *args: Any, **kwargs: Any) -> None:
        widen(self, coming.abs().max().expand_as(coming), *args, **kwargs)

    monkeypatch.setattr(Accumulator, "_widen", all_as_the_largest)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["sums of all sizes"], chunk=CHUNK, schedule=sg.Rebuild())


@pytest.mark.parametrize("schedule", [sg.Keep(), sg.Binomial(3)], ids=["Keep", "Binomial"])
def test_quanta_not_kept_with_a_copy(monkeypatch: pytest.MonkeyPatch, schedule: sg.Schedule) -> None:
    restore = Accumulator.restore
    monkeypatch.setattr(
        Accumulator, "restore", lambda self, snapshot: restore(self, snapshot._replace(scales=self._scales))
    )
    with pytest.raises((AssertionError, sg.StateMismatchError), match=r"off by|other bits"):
        contract.check(build["growing sums"], chunk=CHUNK, schedule=schedule)


def test_a_sum_rolled_back_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    def subtract(self: Accumulator, delta: Tensor) -> bool:
        """(a + b) - b in float64, which is not a."""
        quanta = delta.double() * 2.0 ** -self.exponents.double() if delta.is_floating_point() else delta
        self._data = (self._data.double() - quanta).to(self._data.dtype)
        self._num_adds, self._value = self._num_adds - 1, None
        return True

    monkeypatch.setattr(Accumulator, "subtract", subtract)
    with pytest.raises(sg.StateMismatchError, match="other bits"):
        contract.check(build["linear attention"], chunk=CHUNK, schedule=sg.Rebuild())


def test_a_gradient_delivered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = Gather.deliver

    def twice(self: Gather, *args: Any, **kwargs: Any) -> None:
        gathered = [stand_in.grad for stand_in in self.stand_ins]
        deliver(self, *args, **kwargs)
        for stand_in, gradient in zip(self.stand_ins, gathered, strict=True):
            stand_in.grad = gradient
        deliver(self, *args, **kwargs)

    monkeypatch.setattr(Gather, "deliver", twice)
    with pytest.raises(AssertionError, match=r"off by 1.0e\+00"):
        contract.check(build["gated"], chunk=CHUNK)


def test_a_gradient_returned_twice_by_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: Callable = Call.gradients
    monkeypatch.setattr(
        Call, "gradients", lambda self, grads: [None if g is None else 2 * g for g in gradients(self, grads)]
    )
    with pytest.raises(AssertionError, match=r"off by 1.0e\+00"):
        contract.check(build["gated"], chunk=CHUNK, way="loss")


def test_a_cotangent_of_other_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = outputs._slices

    def off_by_one(along: Any) -> Any:
        return slices([None if g is None else g.roll(1, 1) for g in along])

    monkeypatch.setattr(outputs, "_slices", off_by_one)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["gated"], chunk=CHUNK, way="outputs")


def test_outputs_put_down_at_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Collected.write

    def off_by_one(self: Collected, outputs: Any, span: Span, time: int) -> None:
        write(self, outputs, span, time)
        self.along = [x.roll(1, 1) if span.stop == time else x for x in self.along]

    monkeypatch.setattr(Collected, "write", off_by_one)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["gated"], chunk=CHUNK, way="outputs")


def test_a_remainder_of_one_token_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Cut.__getitem__
    monkeypatch.setattr(
        Cut, "__getitem__", lambda self, n: Span(n * self.chunk, min(at(self, n).stop, (n + 1) * self.chunk))
    )
    with pytest.raises(AssertionError, match="off by"):
        contract.check(lambda: shortened(build["gated"], 5 * CHUNK + 1), chunk=CHUNK)
    contract.check(lambda: shortened(build["gated"], 5 * CHUNK + 2), chunk=CHUNK)


def test_a_chunk_reversed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    add_product = Gather.add_product
    calls = iter(range(1000))

    def again(self: Gather, stand_in: Tensor, left: Tensor, right: Tensor) -> None:
        for _ in range(2 if next(calls) == 5 else 1):
            add_product(self, stand_in, left, right)

    monkeypatch.setattr(Gather, "add_product", again)
    with pytest.raises(AssertionError, match="off by"):
        contract.check(build["linear attention"], chunk=CHUNK)


def test_unmutated_code_passes_the_same_checks() -> None:
    for name in ("gated", "cached", "all kinds", "linear attention", "growing sums", "sums of all sizes", "signals"):
        for way in ("backward", "loss", "outputs"):
            contract.check(build[name], chunk=CHUNK, way=way)
    contract.check_carried(build["all kinds"], cuts=[58], chunks=[CHUNK, CHUNK])
    contract.check_draws(GatedRecurrence().double(), tokens(), chunk=CHUNK)
