"""For tests of chunks that do not fit into memory."""

from __future__ import annotations

from typing import Any

import pytest

from slimgrad.sweep.progress import Progress
from tests.sweep.refusing import Refuse, Refuser


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Makes a refuser that knows what the sweep runs a chunk for."""
    made: list[Refuser] = []
    original = Progress.bind

    def bind(self: Progress, *arguments: Any) -> Any:
        for refuser in made:
            refuser.progress = self
        return original(self, *arguments)

    monkeypatch.setattr(Progress, "bind", bind)

    def make(place: str, limit: int = 40) -> Refuser:
        made.append(Refuser(place, limit))
        return made[-1]

    return make
