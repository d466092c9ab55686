"""`--log`: the rows of a run for the dashboards that people have."""

from __future__ import annotations

import os
from typing import Any, Protocol

from slimgrad.bytelm import Row, RunFolder, TrainConfig
from slimgrad.errors import InputError
from slimgrad.extras import require_extra

TRACKERS = ("tensorboard", "trackio")
PROJECT = "slimgrad"


class Tracker(Protocol):
    """Takes the row of each step."""

    def __call__(self, row: Row) -> None: ...

    def close(self) -> None:
        """Write what is left."""
        ...


def require_tracker(name: str) -> None:
    """Refuse what is no tracker, or is not installed.

    Raises:
        InputError: no such tracker.
        MissingExtraError: it is not installed.
    """
    if name not in TRACKERS:
        raise InputError(f"--log {name}: expected one of {', '.join(TRACKERS)}")
    require_extra(name, f"--log {name}")


def open_tracker(name: str, folder: RunFolder, config: TrainConfig) -> Tracker:
    """The one of that name; what a resumed run does again replaces what was there, or is shown beside it."""
    if name == "tensorboard":
        return _TensorBoard(folder)
    return _Trackio(folder, config)


def _scalars(row: Row) -> dict[str, float]:
    found = {
        "training/bits_per_byte": row.bits,
        "training/learning_rate": row.learning_rate,
        "training/gradient_norm": row.gradient_norm,
        "training/bytes_per_second": row.bytes_per_second,
        "validation/bits_per_byte": row.validation_bits,
        "validation/accuracy": row.validation_accuracy,
    }
    return {name: value for name, value in found.items() if value is not None}


class _TensorBoard:
    """Scalars in the run's folder `tensorboard`."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        after_step = folder.snapshot.step if folder.snapshot else 0
        self._writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=after_step + 1)

    def __call__(self, row: Row) -> None:
        for name, value in _scalars(row).items():
            self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A run of trackio's project "slimgrad", on this machine, called like the run's folder."""

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        made: Any = trackio
        name = os.path.basename(os.path.abspath(folder.path))
        self._run: Any = made.init(project=PROJECT, name=name, config=config.to_dict(), resume="allow")

    def __call__(self, row: Row) -> None:
        self._run.log(_scalars(row), step=row.step)

    def close(self) -> None:
        self._run.finish()
