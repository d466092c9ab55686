"""Rows in a file are those in memory, to the bit and however they are cut; damage is an error by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimgrad as sg
from slimgrad.models import Cached
from slimgrad.sweep import series
from slimgrad.sweep.files import ScratchFile
from slimgrad.sweep.series import FileSeries, Series
from slimgrad.sweep.store import Store
from tests.sweep.opened import open_files
from tests.sweep.refusing import Refuse, Refused
from tests.toy_models import AllKinds, CachedAttention

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reaches for files without a name through /proc")
CPU = torch.device("cpu")
TOKENS = torch.arange(2 * 82).reshape(2, 82) * 7 % 13
ROWS = (3, 2)  # of each of the batch


@pytest.fixture(params=[1, 5 * 2 * 6 * 4, 1 << 18], ids=["a row each", "five rows", "all in one"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a block: one row of a batch of two, five (of `ROWS`), more than there are."""
    monkeypatch.setattr(series, "_BLOCK_BYTES", request.param)
    return request.param


def pair(folder: Path, dtype: torch.dtype = torch.float32, capacity: int = 0) -> tuple[Series, Series]:
    """The same in memory and in a file."""
    shape = (2, capacity, *ROWS)
    return tuple(Store(place).series(shape, dtype, CPU, zeros=True) for place in ("device", folder))  # pyright: ignore


def both_read(pair: tuple[Series, Series], length: int) -> None:
    for first in range(0, length, 3):
        for stop in range(first, length + 1, 4):
            one, other = (x.read(first, stop, CPU) for x in pair)
            assert torch.equal(one, other)
            assert other.shape == (2, stop - first, *ROWS)
            # as aligned as in one buffer, each of the batch: matrix products give other bits elsewhere
            assert all(x.data_ptr() % 64 == first * 6 * x.itemsize % 64 for x in other if x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.usefixtures("block")
def test_rows_in_a_file_are_those_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = pair(tmp_path, dtype)
    for start, stop in ((0, 0), (0, 7), (7, 8), (8, 23), (5, 9), (3, 26)):  # the last two in place of others
        new = torch.randn(2, stop - start, *ROWS).mul(9).to(dtype)
        for x in rows:
            if stop > x.capacity:
                x.grow(stop, start)
            x.write(start, new)
        both_read(rows, stop)
    assert all(x.capacity >= 26 for x in rows)


@pytest.mark.usefixtures("block")
def test_gradients_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    rows = pair(tmp_path, capacity=26)
    for start, stop in ((20, 26), (0, 20), (11, 15), (0, 3), (3, 3)):
        new = torch.randn(2, stop - start, *ROWS, dtype=torch.bfloat16)
        for x in rows:
            x.add(start, new)
        both_read(rows, 26)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
def test_a_state_goes_from_place_to_place(before: int, after: int, tmp_path: Path) -> None:
    one, other = pair(tmp_path)[before], pair(tmp_path)[after]
    one.grow(13, 0)
    one.write(0, torch.randn(2, 9, *ROWS))
    one.grow(29, 9)
    one.write(9, torch.randn(2, 20, *ROWS))
    other.load_state(one.state(29))
    assert torch.equal(one.read(0, 29, CPU), other.read(0, 29, CPU))


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was never written is not."""
    monkeypatch.setattr(series, "_BLOCK_BYTES", 5 * 48)
    read, seen = ScratchFile.read, []
    monkeypatch.setattr(
        ScratchFile, "read", lambda file, into, *where: seen.append(len(into)) or read(file, into, *where)
    )
    rows = FileSeries((2, 100, *ROWS), torch.float32, ScratchFile(tmp_path))
    rows.write(0, torch.randn(2, 60, *ROWS))
    seen.clear()
    rows.read(31, 39, CPU)
    assert seen == [240, 240]
    rows.read(70, 90, CPU)
    rows.add(70, torch.randn(2, 5, *ROWS))
    assert len(seen) == 2


# --- in a sweep ---


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("window", [None, 9, 40])
@pytest.mark.parametrize(
    "schedule", [sg.Rebuild, sg.Keep, lambda **places: sg.Every(2, **places), lambda **places: sg.Binomial(2, **places)]
)
def test_a_cache_on_disk_gives_the_same_bits(window: int | None, schedule: Any, tmp_path: Path) -> None:
    model = Cached(width=12, window=window)

    def gradients(schedule: sg.Schedule) -> list[Tensor]:
        model.zero_grad()
        result = sg.backward(model, TOKENS, chunk=16, schedule=schedule)
        return [result.loss, *(p.grad for p in model.parameters())]

    expected, found = gradients(schedule()), gradients(schedule(store=tmp_path, rows=tmp_path))
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("place", ["forward", "reverse"])
def test_chunks_in_parts_write_over_their_rows(place: str, refuse: Refuse, tmp_path: Path) -> None:
    model = AllKinds().double()
    sg.backward(model, TOKENS, chunk=41)
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    refuser = refuse(place, 40)
    sg.backward(Refused(model, refuser), TOKENS, chunk=41, schedule=sg.Every(2, rows=tmp_path))
    assert refuser.times > 0
    for x, p in zip(expected, model.parameters(), strict=True):
        assert float((x - p.grad).norm()) <= 1e-12 * float(x.norm())


@on_linux
@pytest.mark.parametrize("kind", [CachedAttention, lambda: Cached(width=12)])
@pytest.mark.parametrize("phase", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (lambda file: os.ftruncate(file, 100), r"got 100: it was cut off"),
        (lambda file: os.pwrite(file, b"\1\2\3", 5), "read back with other bytes than were written"),
    ],
    ids=["cut off", "written to"],
)
def test_rows_that_were_damaged_are_an_error(kind: Any, phase: str, damage: Any, how: str, tmp_path: Path) -> None:
    model: nn.Module = kind()

    def harm(event: sg.Event) -> None:
        if event.phase == phase and event.start == 32:
            [file] = open_files(tmp_path)
            damage(file)

    with pytest.raises(sg.StorageError, match=rf"^{tmp_path}: a file .* of kept states: expected [\d,]+ bytes, {how}"):
        sg.backward(model, TOKENS, chunk=16, schedule=sg.Rebuild(rows=tmp_path), on_chunk=harm)
    assert all(p.grad is None for p in model.parameters())
    assert open_files(tmp_path) == []


@on_linux
@pytest.mark.parametrize(("window", "before", "with_gradient"), [(None, 48, 64), (9, 8, 8)])
def test_what_a_chunk_will_ask_for_is_fetched_before_it_runs(
    window: int | None, before: int, with_gradient: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before it, as many as the last chunk asked for, counted in blocks of one row; and what gradients there are.

    Those of the chunk's own rows as well: in a window, those that the chunk after it reached.
    """
    monkeypatch.setattr(series, "_BLOCK_BYTES", 1)
    fetched: list[int] = []
    monkeypatch.setattr(ScratchFile, "fetch", lambda file, start, num_bytes: fetched.append(start))

    def look(event: sg.Event) -> None:
        if (event.phase, event.start) in (("forward", 48), ("reverse", 48)):
            counts[event.phase] = len(fetched)
        fetched.clear()

    counts: dict[str, int] = {}
    sg.backward(Cached(width=12, window=window), TOKENS, chunk=16, schedule=sg.Rebuild(rows=tmp_path), on_chunk=look)
    assert counts == {"forward": before, "reverse": before + with_gradient}
