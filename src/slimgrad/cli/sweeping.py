"""How far one gradient is, on the terminal: which sweep, how fast, in what memory, and for how long still."""

from __future__ import annotations

from time import perf_counter

from rich.progress import Progress, TaskID

from slimgrad.budget.process import resident_bytes
from slimgrad.bytelm.config import TrainConfig
from slimgrad.bytelm.journalled import tokens_done
from slimgrad.cli.words import megabytes
from slimgrad.sweep.program import Event

SHOWN_AFTER = 2.0  # seconds: a gradient that is done before needs no bar of its own
SAID_AFTER = 60.0  # seconds: where there is no terminal, lines are for those that take long
_LINES = 20  # of one gradient, where there is no terminal
_BETWEEN = 0.1  # seconds


class SweepBar:
    """Hears of every chunk; a bar comes with a gradient that takes longer than a moment, and goes with it.

    Time left is estimated as if both sweeps took the time of their products: back, 3s / (s - 5/6) of forward for s
    layers (the way forward leaves out the head, and of the last layer what does not feed its sums).
    """

    def __init__(self, progress: Progress, config: TrainConfig) -> None:
        layers = config.model.layers
        self._progress, self._batch, self._back = progress, config.batch, 3 * layers / (layers - 5 / 6)
        self._bar: TaskID | None = None
        self._done, self._lines = 0, 0
        self._phase = ""
        self._began = self._turned = self._drawn = 0.0
        self._turned_at = 0

    def __call__(self, event: Event) -> None:
        """After a chunk."""
        if event.phase == "again":
            return
        now, done = perf_counter(), tokens_done(event)
        if not self._phase or done <= self._done:  # another gradient
            self._began, self._lines, self._phase = now, done * _LINES // (2 * event.length), ""
        if event.phase != self._phase:
            self._phase, self._turned, self._turned_at = event.phase, now, done
        self._done = done
        if done == 2 * event.length:
            self._phase = ""
            self._remove()
        elif now - self._began > SHOWN_AFTER and now - self._drawn > _BETWEEN:
            self._drawn = now
            self._draw(event, now)

    def _draw(self, event: Event, now: float) -> None:
        back = event.phase == "reverse"
        position = event.length - event.start if back else event.stop
        speed = self._batch * (self._done - self._turned_at) / max(now - self._turned, 1e-9)
        words = (
            f"{'back' if back else 'forward'} {self._batch * position:,} of {self._batch * event.length:,} bytes  "
            f"{speed:,.0f} bytes/s  {megabytes(resident_bytes())}"
        )
        if self._progress.console.is_terminal:
            if self._bar is None:
                self._bar = self._progress.add_task("", total=event.length * (1 + self._back))
            completed = event.length + self._back * position if back else position
            self._progress.update(self._bar, completed=completed, description=words)
        elif now - self._began > SAID_AFTER and self._done * _LINES // (2 * event.length) > self._lines:
            self._lines = self._done * _LINES // (2 * event.length)
            self._progress.console.print(f"gradient: {words}")

    def _remove(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
