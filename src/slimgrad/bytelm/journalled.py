"""A gradient that takes long is saved on the way: after a kill it goes on from there, to the same bits.

```
RUN/
  gradient/step-00000007/      a saved `slimgrad.Segment`: step 7's gradient as far as it came
  traces/step-00000007.jsonl   seconds, memory and adjoint along a gradient that was saved, for pictures
```

The first is there from the first save until the step's snapshot is on the disk. It belongs to the snapshot of the step
before, which is written first: a session that begins with another step drops it. What was saved is the whole gradient,
with its chunk and its schedule, so it goes on with these, whatever was asked for since.

Cost: nothing for gradients of less than a minute; else a save each fifty times its own duration, which is 2 % of the
time, and on the disk what a segment holds.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from slimgrad.budget.process import resident_bytes
from slimgrad.call.segment import Segment
from slimgrad.data import Sequences
from slimgrad.errors import InputError, StorageError
from slimgrad.models.performer import Performer
from slimgrad.runs.files import PARTIAL, storage_errors, write_atomically
from slimgrad.runs.stopping import Interrupted, Stop
from slimgrad.sweep.program import Event, OnChunk
from slimgrad.sweep.schedules.base import Schedule

logger = logging.getLogger("slimgrad")
GRADIENT, TRACES, _RECORD = "gradient", "traces", "segment.json"
TRACE_LINES = 2000


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a gradient is saved.

    Attributes:
        first: seconds until the first save: a gradient that is done before is never saved.
        costs: from one save to the next there are so many times the seconds that it took,
        least: and so many seconds at least.
    """

    first: float = 60.0
    costs: float = 50.0
    least: float = 10.0


class GradientJournal:
    """Where the gradients of a run's steps are saved on the way, one at a time.

    Args:
        run: the run's folder.
        step: the next step, from 1. What was saved of its gradient is kept, what is there of others is removed.
        pace: when to save.
        stop: whether a signal has come. After the chunk at hand the gradient is saved, if it has run for longer than
            that takes, and `Interrupted` raised; at its end nothing is raised, since nothing is lost.
        before_first_save: has the snapshot written which a saved gradient belongs to.
        on_chunk: called with an `Event` after every chunk.

    Attributes:
        seconds_before: what earlier sessions took for the gradient at hand.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        *,
        pace: Pace,
        stop: Stop,
        before_first_save: Callable[[], None],
        on_chunk: OnChunk | None,
    ) -> None:
        self._run, self._pace, self._stop = run, pace, stop
        self._before_first_save, self._on_chunk = before_first_save, on_chunk
        self._is_saved, self._tokens = False, 0
        self.seconds_before = 0.0
        for other in (run / GRADIENT).glob("*"):
            if other != saved_gradient(run, step):
                shutil.rmtree(other, ignore_errors=True)

    def add_gradient(
        self,
        step: int,
        model: Performer,
        inputs: Sequences,
        targets: Any,
        *,
        chunk: int,
        schedule: Schedule | None,
        normalizer: float,
        state: Any,
    ) -> float:
        """As `slimgrad.backward` does with one sequence, in every bit; return the loss.

        Raises:
            InputError: what was saved of it is damaged, or was made with other weights, threads or software.
            Interrupted: a signal has come.
        """
        self._stop.check()
        self._folder, self._trace = _folder(self._run, step), _Trace(self._run, step)
        saved = saved_gradient(self._run, step)
        if saved is None:
            segment = Segment(model, inputs, targets, chunk=chunk, schedule=schedule, state=state, final_state=False)
        else:
            segment = _load(saved, model, inputs, targets)
            self._trace.load()
        self._is_saved, self.seconds_before = saved is not None, self._trace.seconds_before
        self._began = self._saved_at = perf_counter()
        self._due = self._began + (self._pace.first if saved is None else self._pace.least)
        self._cost = 1.0  # seconds, until a save was measured
        segment.on_chunk = functools.partial(self._after_chunk, segment)
        segment.forward()
        result = segment.reverse(1.0 / normalizer if segment.phase == "swept" else None)
        if self._is_saved:
            self._unless_disk_is_full(self._trace.write)
        return float(result.loss)

    @property
    def is_saved(self) -> bool:
        """Whether the last gradient was saved on its way: then its step should be saved when it is done."""
        return self._is_saved

    def forget(self, step: int) -> None:
        """The snapshot after `step` is on the disk: what was saved of its gradient goes."""
        saved = saved_gradient(self._run, step)
        if saved is not None:
            doomed = saved.with_name(f"{PARTIAL}{saved.name}")
            saved.rename(doomed)  # half removed, it no longer bears the name
            shutil.rmtree(doomed, ignore_errors=True)
            with suppress(OSError):
                (self._run / GRADIENT).rmdir()
        self._is_saved = False

    def _after_chunk(self, segment: Segment, event: Event) -> None:
        if self._on_chunk is not None:
            self._on_chunk(event)
        now = perf_counter()
        if event.phase != "again":
            self._tokens = tokens_done(event)
            self._trace.add(event, self._tokens, now - self._began)
        if event.phase == "reverse" and event.start == 0:
            return
        if now >= self._due or (self._stop.is_asked and now - self._saved_at > self._cost):
            self._save(segment)
        try:
            self._stop.check()
        except Interrupted as interrupted:
            if self._is_saved:
                interrupted.add_note(
                    f"the gradient at hand is saved, {self._tokens / (2 * event.length):.0%} of it done"
                )
            raise

    def _save(self, segment: Segment) -> None:
        began = perf_counter()

        def save() -> None:
            if not self._is_saved:
                self._before_first_save()
            segment.save(self._folder)
            self._is_saved = True
            self._trace.write()

        done = self._unless_disk_is_full(save)
        now = perf_counter()
        self._cost = now - began
        wait = max(self._pace.costs * self._cost, self._pace.least)
        self._saved_at, self._due = now, now + (wait if done else max(wait, self._pace.first))

    def _unless_disk_is_full(self, write: Callable[[], None]) -> bool:
        """Write; where that cannot be, go on without: what was saved before is as it was."""
        try:
            write()
        except StorageError as error:
            before = "what was saved of it before is as it was" if self._is_saved else "nothing is saved of it yet"
            logger.warning("%s. The gradient goes on; %s", error, before)
            return False
        return True


class _Trace:
    """Lines along one gradient, `TRACE_LINES` at most: of chunks at even distances in both sweeps."""

    def __init__(self, run: Path, step: int) -> None:
        self._path = run / TRACES / f"{_name(step)}.jsonl"
        self._rows: list[dict[str, Any]] = []
        self.seconds_before = 0.0

    def load(self) -> None:
        """Go on with what an earlier session wrote, if it did."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # it is for pictures alone
            self._rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            self.seconds_before = float(self._rows[-1]["seconds"]) if self._rows else 0.0

    def add(self, event: Event, done: int, seconds: float) -> None:
        """Note a chunk, if its turn has come. What comes a second time takes the place of what was noted first."""
        while self._rows and self._rows[-1]["tokens"] >= done:
            self._rows.pop()
        before = self._rows[-1]["tokens"] if self._rows else -1
        if done * TRACE_LINES // (2 * event.length) > before * TRACE_LINES // (2 * event.length):
            row = {
                "seconds": round(self.seconds_before + seconds, 3),
                "phase": event.phase,
                "position": event.stop if event.phase == "forward" else event.start,
                "tokens": done,
                "resident_bytes": resident_bytes(),
                "held_bytes": event.held_bytes,
                "adjoint_norm": event.adjoint_norm,
            }
            self._rows.append(row)

    def write(self) -> None:
        """All of it. Raises `StorageError`."""
        with storage_errors(self._path):
            self._path.parent.mkdir(exist_ok=True)
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in self._rows).encode())


def saved_gradient(run: Path, step: int) -> Path | None:
    """Where the gradient of a step lies that was saved on its way; None where none was."""
    folder = _folder(run, step)
    return folder if (folder / _RECORD).exists() else None


def tokens_done(event: Event) -> int:
    """Tokens of both sweeps that are done after a chunk of either, of twice the length."""
    return event.stop if event.phase == "forward" else 2 * event.length - event.start


def _load(folder: Path, model: Performer, inputs: Sequences, targets: Any) -> Segment:
    try:
        return Segment.load(folder, model, inputs, targets)
    except InputError as error:
        raise InputError(f"{error}. To begin this gradient anew, remove {folder.parent}") from error


def _folder(run: Path, step: int) -> Path:
    return run / GRADIENT / _name(step)


def _name(step: int) -> str:
    return f"step-{step:08d}"
