"""Several documents as one run of bytes: read anywhere, cut anywhere, copied only across an edge.

What lies in a file is read when it is asked for, and not mapped: a mapped page counts as resident memory of the process
until somebody else wants it, one that is gone with the end of its file kills the process, and every map takes a
descriptor. Reading copies the span. Cost: a file is opened for each.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimgrad.errors import InputError

AT_ONCE = 1 << 20  # bytes: a sequence of no more is a tensor; of more, it is read as it is used


class FileBytes:
    """Bytes of a file, or a stretch of them, that are read when asked for; nothing is held open.

    Args:
        path: the file.
        start, stop: the stretch; its length is the caller's to know.
    """

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self.path, self._start, self._stop = path, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, span: slice) -> FileBytes:
        start, stop, _ = span.indices(len(self))
        return FileBytes(self.path, self._start + start, self._start + max(start, stop))

    def read(self) -> Tensor:
        """All of them, uint8 `[bytes]`.

        Raises:
            InputError: the file cannot be read, or ends before them.
        """
        content, done = bytearray(len(self)), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start)
                while done < len(content) and (count := file.readinto(memoryview(content)[done:])):
                    done += count
        except OSError as error:
            raise InputError(
                f"{self.path}: expected a readable file, got: {error.strerror or error}. Check its rights"
            ) from error
        if done < len(content):
            raise InputError(
                f"{self.path}: expected bytes up to {self._stop:,}, as when it was opened, the file ends at "
                f"{self._start + done:,} now. Put the former file back"
            )
        return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


class Documents:
    """Bytes of one or several documents in order; each a uint8 tensor `[bytes]`, or those of a file.

    Raises:
        InputError: there is no document, or one is empty.
    """

    def __init__(self, documents: Iterable[Tensor | FileBytes]) -> None:
        self.documents = tuple(documents)
        if not self.documents or any(len(document) == 0 for document in self.documents):
            raise InputError("expected at least one document, and none that is empty")
        self._ends = list(itertools.accumulate(len(document) for document in self.documents))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where each document begins and ends in the concatenation."""
        return list(itertools.pairwise([0, *self._ends]))

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of the concatenation: a view where one tensor holds them, else a copy."""
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"expected 0 <= start <= stop <= {len(self):,}, got {start:,} and {stop:,}")
        between = self._between(start, stop)
        pieces = [piece if isinstance(piece, Tensor) else piece.read() for piece in between]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)

    def pieces(self, start: int, stop: int, num_bytes: int = AT_ONCE) -> Iterator[Tensor]:
        """Bytes `start` to `stop`, `num_bytes` at a time."""
        return (self.read(at, min(at + num_bytes, stop)) for at in range(start, stop, num_bytes))

    def windows(self, starts: Sequence[int], length: int) -> Tensor | Windows:
        """Stretches of `length` side by side: uint8 `[batch, length]`, or, where they are long, their reader."""
        windows = Windows(self, starts, length)
        return windows.read(0, length) if windows.batch * length <= AT_ONCE else windows

    def cut(self, at: int) -> tuple[Documents, Documents]:
        """The bytes before `at`, and those from there on; a document across the cut becomes two."""
        if not 0 < at < len(self):
            raise InputError(f"expected a cut within the {len(self):,} bytes, got {at:,}")
        return self.apart([(at, len(self))])

    def apart(self, spans: Sequence[tuple[int, int]]) -> tuple[Documents, Documents]:
        """What is left, and the stretches `spans`: `(start, stop)`, in order, without overlap, not all there is.

        A document across an edge becomes several.
        """
        left: list[Tensor | FileBytes] = []
        taken: list[Tensor | FileBytes] = []
        edges = [0, *itertools.chain(*spans), len(self)]
        for index, (start, stop) in enumerate(itertools.pairwise(edges)):
            (taken if index % 2 else left).extend(self._between(start, stop))
        return Documents(left), Documents(taken)

    def _between(self, start: int, stop: int) -> Iterator[Tensor | FileBytes]:
        """The documents, or parts of them, that lie there; none of them is empty."""
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            document, end = self.documents[index], self._ends[index]
            offset = end - len(document)
            yield document[start - offset : min(stop, end) - offset]
            start, index = min(stop, end), index + 1

    def sha256(self) -> str:
        """Of the concatenation, read piece by piece."""
        digest = hashlib.sha256()
        for piece in self.pieces(0, len(self)):
            digest.update(piece.contiguous().numpy().data)
        return digest.hexdigest()


class Windows:
    """Stretches of a text side by side, which are read as they are used: a `slimgrad.Reader` of uint8 `[batch, time]`.

    Args:
        text: where they lie.
        starts: where each begins.
        length: bytes of each.
    """

    def __init__(self, text: Documents, starts: Sequence[int], length: int) -> None:
        self.text, self.starts, self.length = text, tuple(starts), length

    @property
    def batch(self) -> int:
        """How many they are."""
        return len(self.starts)

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of each. A view where it is one, and a tensor holds it."""
        rows = [self.text.read(at + start, at + stop) for at in self.starts]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)
