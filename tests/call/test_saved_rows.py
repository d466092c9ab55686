"""Rows in the files of a saved segment: what was written is not written again, and what is read is what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slimgrad as sg
from slimgrad.call.saved_rows import SavedRows, taken_out
from slimgrad.sweep.series import Rows
from tests.call.segments import CHUNK, TOKENS, bits, built, different, finished, segment

DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.uint8)


def rows_of(x: Tensor, *, steady: bool = True, some: int = 3) -> Rows:
    """As a series gives them, so many at once."""

    def pieces(first: int) -> Iterator[Tensor]:
        for start in range(first, x.shape[1], some):
            yield x[:, start : start + some]

    return Rows((x.shape[0], x.shape[1] + 5, *x.shape[2:]), x.dtype, x.shape[1], steady, pieces)


def read_back(saved: SavedRows, series: dict[str, Rows]) -> list[Tensor]:
    """What stands in the files."""
    again = SavedRows(saved.folder, saved.as_dict())
    again.check()
    found: list[Tensor] = []
    for rows in again.put_back(taken_out(list(series.values()), {})):
        empty = torch.empty(rows.shape[0], 0, *rows.shape[2:], dtype=rows.dtype)
        found.append(torch.cat([empty, *rows.pieces(0)], 1))
    return found


def random_rows(batch: int, length: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(batch, length, 3, dtype=torch.float64) * 9).to(dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
def test_whatever_is_saved_in_turn_the_last_is_read(
    data: st.DataObject, batch: int, dtypes: list[torch.dtype], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Longer and shorter rows, rows that are steady and rows that are not, and others in their place."""
    saved = SavedRows(tmp_path_factory.mktemp("saved"))
    xs, steady = [random_rows(batch, 0, dtype) for dtype in dtypes], [True] * len(dtypes)
    for _ in range(data.draw(st.integers(1, 5))):
        for k, dtype in enumerate(dtypes):
            length = data.draw(st.integers(0, 20))
            steady[k] = steady[k] and data.draw(st.booleans())
            kept = xs[k][:, :length] if steady[k] else xs[k][:, :0]
            xs[k] = torch.cat([kept, random_rows(batch, length - kept.shape[1], dtype)], 1)
        series = {
            f"/{k}": rows_of(x, steady=one, some=data.draw(st.integers(1, 9)))
            for k, (x, one) in enumerate(zip(xs, steady, strict=True))
        }
        saved = saved.with_new(series)
        for x, found in zip(xs, read_back(saved, series), strict=True):
            assert torch.equal(found, x)
        for path in saved.folder.iterdir():
            if path.name not in saved.checksums:
                path.unlink()  # as a save does when its record is written


def test_only_new_rows_are_written(tmp_path: Path) -> None:
    x = random_rows(1, 1000, torch.float32)
    saved, sizes = SavedRows(tmp_path), list[int]()
    for length in (400, 1000, 1000):
        before = sum(path.stat().st_size for path in tmp_path.iterdir())
        saved = saved.with_new({"/0": rows_of(x[:, :length])})
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()) - before)
    assert sizes == [400 * 12, 600 * 12, 0]
    assert len(saved.as_dict()["parts"]["/0"]) == 2  # of one sequence pieces lie beside each other


# --- of a segment ---


def written_by(folder: Path, before: dict[str, int]) -> int:
    """Bytes of the files of rows that are new."""
    return sum(path.stat().st_size for path in folder.glob("rows-*") if path.name not in before)


def test_a_save_appends_its_chunks_rows(tmp_path: Path) -> None:
    """In the first sweep a chunk's rows; in the reverse sweep, the gradients of the rows before it."""
    one, written, names = segment(built("rows")), list[tuple[str, int]](), dict[str, int]()

    def save(event: sg.Event) -> None:
        one.save(tmp_path)
        written.append((event.phase, written_by(tmp_path, names)))
        names.update({path.name: 0 for path in tmp_path.glob("rows-*")})

    one.on_chunk = save
    finished(one)
    forth = [size for phase, size in written if phase == "forward"]
    back = [size for phase, size in written if phase == "reverse"]
    row = forth[0] // CHUNK
    assert forth[:-1] == [CHUNK * row] * 4
    assert forth[-1] < 10 * row  # of 9 tokens, and what aligns them
    assert back == [32 * row, 24 * row, 16 * row, 8 * row, 0]


def test_where_another_has_saved_meanwhile_all_rows_are_written(tmp_path: Path) -> None:
    expected, count = built("rows"), 0
    whole = bits(expected, finished(segment(expected)))
    one = segment(built("rows"))

    def save(event: sg.Event) -> None:
        nonlocal count
        count += 1
        if count == 3:  # its files take the place of what was there
            segment(built("sums")).save(tmp_path)
        one.save(tmp_path)
        if count == 4:
            raise KeyboardInterrupt

    one.on_chunk = save
    with pytest.raises(KeyboardInterrupt):
        finished(one)
    model = built("rows")
    assert different(bits(model, finished(sg.Segment.load(tmp_path, model, TOKENS))), whole) == []


def test_rows_with_other_bits_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is advanced again in parts may leave other bits in the rows that were saved."""
    one = segment(built("rows"))
    one.forward()
    one.save(tmp_path)
    carriers = one._started.run.progress.carriers  # pyright: ignore[reportPrivateUsage]
    names = {path.name: 0 for path in tmp_path.glob("rows-*")}
    for carrier in carriers:
        rows = carrier.rows(8, 16).detach().clone() * (1 + 1e-15)  # pyright: ignore[reportAttributeAccessIssue]
        carrier._write(rows, 8, 16)  # pyright: ignore[reportAttributeAccessIssue]
    one.save(tmp_path)
    assert names.keys().isdisjoint(path.name for path in tmp_path.glob("rows-*"))
    loaded = sg.Segment.load(tmp_path, built("rows"), TOKENS)
    for mine, theirs in zip(carriers, loaded._started.run.progress.carriers, strict=True):  # pyright: ignore[reportPrivateUsage]
        assert torch.equal(mine.rows(0, 41), theirs.rows(0, 41))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("what", ["flipped", "cut off", "gone"])
def test_a_damaged_file_of_rows_is_refused(what: str, tmp_path: Path) -> None:
    one = segment(built("rows"))
    one.forward()
    one.save(tmp_path)
    path = min(tmp_path.glob("rows-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if what == "flipped" else bytes(content[:-1]))
    expected = r"found no rows-\w+\.bin" if what == "gone" else r"rows-\w+\.bin is damaged: expected sha256"
    with pytest.raises(sg.InputError, match=expected):
        sg.Segment.load(tmp_path, built("rows"), TOKENS)
