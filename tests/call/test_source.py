"""Every span of a sequence is what slicing the whole gives, from memory, a mapped file or a reader; liars are named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from slimgrad.call.source import Reader, SequenceData, source_of
from slimgrad.errors import InputError

CPU = torch.device("cpu")
BATCH, TIME = 3, 23
TOKENS = torch.arange(BATCH * TIME).reshape(BATCH, TIME) * 7 % 13
FLOATS = torch.linspace(-1, 1, BATCH * TIME * 2).reshape(BATCH, TIME, 2)
TREE = {"x": FLOATS, "y": (TOKENS.int(), TOKENS > 6)}
SHIFTED = torch.cat([TOKENS[:, 1:], torch.full((BATCH, 1), -100)], dim=1)


class Reading:
    """Gives the spans of a tree, and notes which it was asked for."""

    def __init__(self, whole: Any, batch: Any = BATCH, length: Any = TIME) -> None:
        self.whole, self.batch, self.length = whole, batch, length
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> Any:
        self.asked.append((start, stop))
        return self.cut(start, stop)

    def cut(self, start: int, stop: int) -> Any:
        return pytree.tree_map(lambda x: x[:, start:stop], self.whole)


class Reusing(Reading):
    """Every read fills one buffer anew and returns a view of it, here after giving other threads a chance."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__(whole)
        self.buffer = torch.empty_like(whole)
        self.inside = self.most = 0

    def cut(self, start: int, stop: int) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.buffer[:, : stop - start] = self.whole[:, start:stop]
        time.sleep(1e-4)
        self.inside -= 1
        return self.buffer[:, : stop - start]


class Lying(Reading):
    """Truthful at first, and then not."""

    def __init__(self, whole: Any, lie: Callable[[Any], Any], truthful: int = 0) -> None:
        super().__init__(whole)
        self.lie, self.truthful = lie, truthful

    def cut(self, start: int, stop: int) -> Any:
        piece = super().cut(start, stop)
        return piece if len(self.asked) <= self.truthful else self.lie(piece)


def data(inputs: Any, targets: Any = None, **options: Any) -> SequenceData:
    return SequenceData(inputs, targets, CPU, **options)


def require_same(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def sliced(whole: Any, start: int, stop: int) -> Any:
    return pytree.tree_map(lambda x: x[:, start:stop], whole)


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    start = draw(st.integers(0, TIME - 1))
    return start, draw(st.integers(start + 1, TIME))


# --- what is read ---


@given(st.lists(spans(), min_size=1, max_size=6), st.sampled_from([TOKENS, FLOATS, TREE]), st.booleans(), st.booleans())
def test_any_spans_in_any_order(asked: list[tuple[int, int]], whole: Any, streams: bool, streams_targets: bool) -> None:
    """Inputs and targets of every kind, from memory and from readers, mixed."""
    inputs = Reading(whole) if streams else whole
    targets = Reading(TREE) if streams_targets else TREE
    sequence = data(inputs, targets)
    assert (sequence.batch, sequence.time) == (BATCH, TIME)
    for start, stop in asked:
        piece = sequence.read(start, stop, targets=True)
        require_same(piece.inputs, sliced(whole, start, stop))
        require_same(piece.targets, sliced(TREE, start, stop))
        alone = sequence.read(start, stop, targets=False)
        require_same(alone.inputs, sliced(whole, start, stop))
        assert alone.targets is None
    if streams:
        assert inputs.asked == [span for span in asked for _ in range(2)]
    if streams_targets:
        assert targets.asked == asked


@given(spans(), st.booleans(), st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.uint16]))
def test_the_next_token(span: tuple[int, int], streams: bool, dtype: torch.dtype) -> None:
    """A reader is asked once, for one token more; where no targets are wanted or none is left, for none."""
    (start, stop), tokens = span, TOKENS.to(dtype)
    reader = Reading(tokens)
    sequence = data(reader if streams else tokens)
    with_targets = sequence.read(start, stop, targets=True)
    without = sequence.read(start, stop, targets=False)
    require_same(with_targets.inputs, tokens[:, start:stop])
    require_same(with_targets.targets, SHIFTED[:, start:stop])
    require_same(without.inputs, tokens[:, start:stop])
    # kernels choose by strides: both sweeps must see the same
    assert with_targets.inputs.stride() == without.inputs.stride()
    if streams:
        assert reader.asked == [(start, min(stop + 1, TIME)), (start, stop)]


@pytest.mark.parametrize("whole", [TOKENS[0], {"x": TOKENS[0], "y": FLOATS[:1]}])
def test_one_axis_is_a_batch_of_one(whole: Any) -> None:
    sequence = data(whole, TOKENS[0])
    assert (sequence.batch, sequence.time) == (1, TIME)
    piece = sequence.read(4, 9, targets=True)
    require_same(piece.targets, TOKENS[:1, 4:9])
    require_same(pytree.tree_leaves(piece.inputs)[0], TOKENS[:1, 4:9])


def test_a_single_token_has_no_target() -> None:
    for inputs in (TOKENS[:, :1], Reading(TOKENS[:, :1], length=1)):
        sequence = data(inputs)
        piece = sequence.read(0, 1, targets=True)
        require_same(piece.targets, torch.full((BATCH, 1), -100))
        assert sequence.count() == 0 == int(sequence.count_in(piece.targets))


def test_mapped_files_are_sliced_where_they_lie(tmp_path: Path) -> None:
    TOKENS.numpy().tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.int64, mode="r+", shape=(BATCH, TIME))
    from_file = torch.from_file(str(tmp_path / "tokens"), shared=True, size=BATCH * TIME, dtype=torch.int64)
    for whole in (torch.from_numpy(mapped), from_file.view(BATCH, TIME)):
        piece = data(whole).read(5, 11, targets=False)
        assert piece.inputs.data_ptr() == whole[:, 5:].data_ptr()
        require_same(piece.inputs, TOKENS[:, 5:11])


def test_which_inputs_take_gradients() -> None:
    whole = {"a": TOKENS, "b": FLOATS.clone().requires_grad_(), "c": FLOATS, "d": FLOATS.clone().requires_grad_()}
    source = data(whole, TOKENS).inputs
    assert source.grad_positions == [1, 3]
    leaves = source.flatten(source.read(2, 7))
    assert [x.requires_grad for x in leaves] == [False, True, False, True]
    require_same(source.unflatten([x.detach() for x in leaves]), sliced(whole, 2, 7))
    assert source.flatten(source.whole)[1] is whole["b"]
    streamed = data(Reading(TREE), TOKENS).inputs
    assert streamed.whole is None
    assert not streamed.grad_positions


def test_pieces_arrive_on_the_device() -> None:
    for inputs in (TREE, Reading(TREE)):
        piece = source_of(inputs, "inputs", torch.device("meta")).read(2, 7)
        assert {x.device.type for x in pytree.tree_leaves(piece)} == {"meta"}


# --- readers and their memory ---


@pytest.mark.parametrize("targets", [True, False])
def test_a_reader_may_reuse_its_buffer(targets: bool) -> None:
    """One object as inputs and targets: its second read overwrites what the first one gave."""
    reader = Reusing(FLOATS)
    sequence = data(reader, reader)
    pieces = [sequence.read(start, start + 5, targets=targets) for start in (0, 7, 18)]
    for start, piece in zip((0, 7, 18), pieces, strict=True):
        require_same(piece.inputs, FLOATS[:, start : start + 5])
        if targets:
            require_same(piece.targets, FLOATS[:, start : start + 5])


@pytest.mark.parametrize(
    "view", [lambda x: x.mT.contiguous().mT, lambda x: x[..., :1].expand_as(x), lambda x: x.clone()]
)
def test_what_a_reader_gives_is_made_contiguous(view: Callable[[Tensor], Tensor]) -> None:
    """Whatever its strides were: they may differ from read to read."""
    whole = TOKENS[..., None].expand(BATCH, TIME, 4)
    piece = source_of(Lying(whole, view), "inputs", CPU).read(3, 9)
    assert piece.is_contiguous()
    require_same(piece, whole[:, 3:9])


def test_what_a_reader_gave_in_inference_mode() -> None:
    """Such tensors cannot be saved for a backward pass; ours can."""
    with torch.inference_mode():
        whole = FLOATS.clone()
    piece = source_of(Reading(whole), "inputs", CPU).read(3, 9)
    assert whole.is_inference()
    assert not piece.is_inference()
    require_same(piece, FLOATS[:, 3:9])


def test_one_thread_at_a_time() -> None:
    """Four sequences in four threads over one reader that reuses its buffer: three as inputs, one as targets."""
    reader, right = Reusing(TOKENS), []

    def work(sequence: SequenceData, offset: int) -> None:
        for n in range(20):
            start = (7 * n + offset) % (TIME - 6)
            piece = sequence.read(start, start + 5, targets=True)
            right.extend(torch.equal(x, TOKENS[:, start : start + 5]) for x in piece)

    sequences = [data(reader, reader) for _ in range(3)] + [data(TOKENS, reader)]
    threads = [threading.Thread(target=work, args=(one, index)) for index, one in enumerate(sequences)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reader.asked) == 20 * 7
    assert right == [True] * (20 * 8)
    assert reader.most == 1


def test_different_readers_do_not_wait_for_each_other() -> None:
    """Each waits within its read until the other is in its own."""
    barrier = threading.Barrier(2, timeout=20)

    def meet(piece: Tensor) -> Tensor:
        barrier.wait()
        return piece

    sources = [source_of(Lying(TOKENS, meet), "inputs", CPU) for _ in range(2)]
    other = threading.Thread(target=sources[1].read, args=(0, 5))
    other.start()
    require_same(sources[0].read(0, 5), TOKENS[:, :5])
    other.join()


# --- readers that lie ---

LIES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("batch", lambda x: x[:2], r"expected a tensor \[3, 5, \.\.\.\] \(batch, stop - start, \.\.\.\), got \[2, 5\]"),
    ("short", lambda x: x[:, :-1], r"expected a tensor \[3, 5, \.\.\.\].*, got \[3, 4\]\..*exactly the tokens"),
    ("long", lambda x: torch.cat([x, x], dim=1), r"got \[3, 10\]"),
    ("no batch", lambda x: x[0], r"got \[5\]\. Give every sequence of the batch, its axis also where it is one"),
    ("NumPy", lambda x: x.numpy(), r"got a ndarray\. For NumPy arrays use torch\.from_numpy"),
    ("None", lambda x: None, r"got a NoneType"),
    ("sparse", lambda x: x.to_sparse(), r"expected a dense tensor .* got a torch\.sparse_coo one.*\.to_dense"),
    (
        "gradients",
        lambda x: x.double().requires_grad_(),
        r"requires gradients, which nobody would receive; expected constants\. Detach it, or pass tensors that require "
        r"gradients whole",
    ),
]
LATER: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "dtype",
        lambda x: x.int(),
        r"expected torch\.int64 \[batch, tokens\], as in the first read, got torch\.int32 \[batch, tokens\]\. A reader",
    ),
    ("trailing", lambda x: x[..., None], r"expected torch.int64 \[batch, tokens\], .*got torch.int64 .*tokens, 1\]"),
    ("a tree", lambda x: {"a": x}, r"expected a tensor \[3, 5, \.\.\.\].*, got a dict"),
]


def require_named(reader: Lying, message: str, name: str) -> None:
    """As inputs and as targets, with the span; and the reader may still be asked for what is right."""
    sequence = data(reader, TOKENS) if name == "inputs" else data(TOKENS, reader)
    for n in range(reader.truthful):
        sequence.read(n, n + 4, targets=True)
    with pytest.raises(InputError, match=rf"^{name}.*: read\(6, 11\): .*{message}"):
        sequence.read(6, 11, targets=True)


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize("truthful", [0, 2])
@pytest.mark.parametrize(("lie", "message"), [case[1:] for case in LIES], ids=[case[0] for case in LIES])
def test_what_no_read_may_give(lie: Callable[[Any], Any], message: str, truthful: int, name: str) -> None:
    require_named(Lying(TOKENS, lie, truthful), message, name)


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize(("lie", "message"), [case[1:] for case in LATER], ids=[case[0] for case in LATER])
def test_what_differs_from_the_first_read(lie: Callable[[Any], Any], message: str, name: str) -> None:
    require_named(Lying(TOKENS, lie, truthful=1), message, name)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (lambda x: {"x": x["x"]}, r"expected the keys \['x', 'y'\], got \['x'\]\. A reader must give the same tree at"),
        (lambda x: x | {"y": list(x["y"])}, r"expected a tuple, got a list"),
        (lambda x: x["x"], r"expected a dict, got a Tensor"),
        (lambda x: x | {"y": x["y"][:1]}, r"expected 2 entries in a tuple, got 1"),
    ],
)
def test_another_tree_than_at_first(lie: Callable[[Any], Any], message: str) -> None:
    require_named(Lying(TREE, lie, truthful=1), message, "inputs")


def test_the_leaf_is_named() -> None:
    source = source_of(Lying(TREE, lambda x: x | {"y": (x["y"][0], x["y"][1].int())}, truthful=1), "targets", CPU)
    source.read(0, 2)
    with pytest.raises(
        InputError, match=r"^targets \['y'\]\[1\]: read\(2, 4\): expected torch\.bool .* got torch\.int32"
    ):
        source.read(2, 4)
    reader = Lying(TREE, lambda x: x | {"y": (x["y"][0], 3)})
    with pytest.raises(InputError, match=r"^inputs \['y'\]\[1\]: read\(0, 2\): expected a tensor .* got a int"):
        source_of(reader, "inputs", CPU).read(0, 2)
    with pytest.raises(InputError, match=r"^inputs: read\(0, 2\): expected a tensor or a tree of tensors, got nothing"):
        source_of(Lying(TREE, lambda x: {}), "inputs", CPU).read(0, 2)


def test_a_first_read_that_was_refused_sets_no_example() -> None:
    source = source_of(Lying(TOKENS, lambda x: x, truthful=0), "inputs", CPU)
    source._reader.lie = lambda x: {"a": x.numpy()}
    with pytest.raises(InputError, match="got a ndarray"):
        source.read(0, 5)
    source._reader.lie = lambda x: x
    require_same(source.read(0, 5), TOKENS[:, :5])


@pytest.mark.parametrize("whole", [FLOATS, FLOATS[..., 0], TREE, TOKENS[..., None]])
def test_next_token_prediction_from_what_is_no_tokens(whole: Any) -> None:
    message = r"read\(4, 10\) gave something else; targets=None means next-token prediction, which needs integer inputs"
    with pytest.raises(InputError, match=f"^inputs: {message}"):
        data(Reading(whole)).read(4, 9, targets=True)
    with pytest.raises(InputError, match=r"^targets=None means next-token prediction, which needs integer inputs \["):
        data(whole)
    for inputs in (whole, Reading(whole)):  # where nothing is predicted, anything may be read
        require_same(data(inputs, has_targets=False).read(4, 9, targets=False).inputs, sliced(whole, 4, 9))


# --- what does not fit before anything is read ---


@pytest.mark.parametrize(("batch", "length"), [(2.0, 5), (True, 5), (None, 5), ("2", 5), (2, [5])])
def test_a_reader_whose_sizes_are_no_numbers(batch: Any, length: Any) -> None:
    for name, arguments in (("inputs", (Reading(TOKENS, batch, length), TOKENS)), ("targets", (TOKENS, ...))):
        arguments = tuple(Reading(TOKENS, batch, length) if x is ... else x for x in arguments)
        message = rf"^{name}: expected a reader whose batch and length are whole numbers, got batch="
        with pytest.raises(InputError, match=message):
            data(*arguments)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (-1, 5)])
def test_a_reader_of_nothing(batch: int, length: int) -> None:
    reader = Reading(TOKENS, batch, length)
    message = f"^expected at least one sequence and one token, got batch {batch} and time {length}$"
    with pytest.raises(InputError, match=message):
        data(reader)
    assert reader.asked == []


def test_sizes_from_numpy() -> None:
    sequence = data(Reading(TOKENS, np.int64(BATCH), np.int32(TIME)))
    assert (type(sequence.batch), type(sequence.time)) == (int, int)
    require_same(sequence.read(2, 7, targets=True).inputs, TOKENS[:, 2:7])


@pytest.mark.parametrize("targets", [Reading(TOKENS, BATCH, TIME - 1), TOKENS[:, 1:], {"labels": TOKENS[:, 1:]}])
def test_targets_of_another_length(targets: Any) -> None:
    message = (
        r"^targets must have the inputs' batch and time \(3, 23\), got \(3, 22\): one target for each step\. For one "
        r"label per sequence write it at the step that should predict it and -100 at all others; for regression pass"
    )
    for inputs in (TOKENS, Reading(TOKENS)):
        with pytest.raises(InputError, match=message):
            data(inputs, targets)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor(3), r"with the same batch and time, got a tensor \[\]\. For NumPy arrays use torch\.from_numpy;"),
        ({"a": TOKENS, "b": TOKENS[:, 1:]}, r"got a tensor \[3, 23\], a tensor \[3, 22\]\."),
        (TOKENS.numpy(), r"got a ndarray\. For NumPy"),
        ({}, r"got nothing\."),
        (object(), r"got a object\. .* one slimgrad\.Reader: length, batch and read\(start, stop\)"),
        ({"a": Reading(TOKENS)}, r"got a Reading\. .* one slimgrad\.Reader: length, batch and read\(start, stop\)"),
    ],
)
def test_what_is_neither_tensors_nor_a_reader(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"^inputs: expected tensors \[batch, time, \.\.\.\].*" + message):
        data(given, TOKENS)
    with pytest.raises(InputError, match=r"^targets: expected tensors \[batch, time, \.\.\.\].*" + message):
        data(TOKENS, given)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(5, 2)], layout=torch.jagged)


@pytest.mark.parametrize(("make", "kind"), [(nested, "nested"), (lambda: FLOATS.to_sparse(), "torch.sparse_coo")])
def test_tensors_that_cannot_be_cut(make: Callable[[], Tensor], kind: str) -> None:
    with pytest.raises(InputError, match=rf"^inputs \['a'\]: expected a dense tensor .*got a {kind} one\. Pass"):
        data({"a": make()}, TOKENS)
    with pytest.raises(InputError, match=rf"^targets: expected a dense tensor .*got a {kind} one\. Pass"):
        data(TOKENS, make())


def test_what_counts_as_a_reader() -> None:
    reader = Reading(TOKENS)
    assert isinstance(reader, Reader)
    del reader.batch
    assert not isinstance(reader, Reader)
    assert not isinstance(TOKENS, Reader)


# --- counting ---

WITH_IGNORED = torch.where(TOKENS % 4 == 0, -100, TOKENS)
COUNTED: list[tuple[Any, int]] = [
    (WITH_IGNORED, int((TOKENS % 4 != 0).sum())),
    (WITH_IGNORED.int(), int((TOKENS % 4 != 0).sum())),
    (torch.where(TOKENS % 4 == 0, 156, TOKENS).to(torch.uint8), BATCH * TIME),  # -100 as uint8: a class like any other
    (WITH_IGNORED.double(), BATCH * TIME),
    ({"labels": WITH_IGNORED, "mask": TOKENS > 6}, BATCH * TIME),
]


@pytest.mark.parametrize(("targets", "expected"), COUNTED)
@given(edges=st.sets(st.integers(1, TIME - 1)))
def test_spans_add_up_to_the_count(targets: Any, expected: int, edges: set[int]) -> None:
    cut = [0, *sorted(edges), TIME]
    for given_targets, known in ((targets, expected), (Reading(targets), None)):
        sequence = data(TOKENS, given_targets)
        assert sequence.count() == known
        pieces = [sequence.read(a, b, targets=True) for a, b in pairwise(cut)]
        counts = [sequence.count_in(piece.targets) for piece in pieces]
        assert all(n.dtype == torch.int64 and n.dim() == 0 for n in counts)
        assert int(torch.stack(counts).sum()) == expected


def test_next_tokens_are_counted_without_reading() -> None:
    reader = Reading(TOKENS)
    sequence = data(reader)
    assert sequence.count() == BATCH * (TIME - 1) == data(TOKENS).count()
    assert reader.asked == []
    counts = [sequence.count_in(sequence.read(a, b, targets=True).targets) for a, b in ((0, 9), (9, 22), (22, TIME))]
    assert [int(n) for n in counts] == [BATCH * 9, BATCH * 13, 0]


# --- checksums ---


@given(spans(), st.sampled_from([TOKENS, TREE]))
def test_checksums_are_the_same_from_anywhere(span: tuple[int, int], whole: Any) -> None:
    """So a gradient that began with tensors in memory can go on with a reader."""
    kinds = [(whole, TREE), (Reading(whole), Reading(TREE))]
    found = [(one := data(*kind)).checksums(one.read(*span, targets=True)) for kind in kinds]
    leaves = ["['x']", "['y'][0]", "['y'][1]"]
    inputs = ["inputs"] if whole is TOKENS else [f"inputs {leaf}" for leaf in leaves]
    assert list(found[0]) == [*inputs, *(f"targets {leaf}" for leaf in leaves)]
    assert found[0] == found[1]
    assert all(x.dtype == torch.int64 and x.dim() == 0 for x in found[0].values())


@pytest.mark.parametrize("streams", [True, False])
def test_every_token_of_a_span_moves_its_checksum(streams: bool) -> None:
    """And that of next-token prediction notices the token after the span."""

    def found(tokens: Tensor, *, targets: bool = True) -> dict[str, int]:
        sequence = data(Reading(tokens) if streams else tokens)
        return {name: int(x) for name, x in sequence.checksums(sequence.read(5, 9, targets=targets)).items()}

    before = found(TOKENS)
    assert list(before) == ["inputs", "targets"]
    assert found(TOKENS, targets=False) == {"inputs": before["inputs"]}
    for at in range(TIME):
        tokens = TOKENS.clone()
        tokens[1, at] += 1
        changed = {name for name, value in found(tokens).items() if value != before[name]}
        assert changed == {name for name, inside in (("inputs", 5 <= at < 9), ("targets", 6 <= at < 10)) if inside}


@pytest.mark.parametrize("make", [torch.Tensor.resolve_conj, lambda x: x.conj(), lambda x: torch._neg_view(x.abs())])
def test_checksums_of_numbers_with_a_pending_sign(make: Callable[[Tensor], Tensor]) -> None:
    """torch leaves a conjugate or a sign to whoever reads the numbers; their bits are those of the number meant."""
    lazy = make(torch.complex(FLOATS[:1, :, 0].contiguous(), FLOATS[:1, :, 1].contiguous()))
    settled = lazy.resolve_conj().resolve_neg().clone()
    found = [(one := data(x, TOKENS[0])).checksums(one.read(2, 9, targets=False)) for x in (lazy, settled)]
    assert found[0] == found[1]
