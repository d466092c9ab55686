"""The parent's side of a child that measures one row: limits on its memory and its seconds, and why it ended."""

from __future__ import annotations

import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from typing import Any

from benchmarks.shown import ROOT
from slimgrad.errors import RunError


class Child:
    """A process that has a model and a sequence, and gives its gradient when asked.

    Args:
        task: what it builds; see `worker.Worker`.
        memory: bytes of data that the kernel lets it have.
        seconds: for all that it is asked, in which it is stopped.
        environment: beside this process' own.
        python: the interpreter, where it isn't this one.
    """

    def __init__(
        self,
        task: Mapping[str, Any],
        *,
        memory: int,
        seconds: float,
        environment: Mapping[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        self.memory, self.limit, self.left = memory, seconds, seconds
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the child)
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.joint.worker"],
            cwd=ROOT,
            env={**os.environ, **quiet, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
        )
        assert self.process.stdin is not None
        self._say({**task, "memory": memory})

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """What the child answers.

        Raises:
            RunError: it took too long, or too much memory, or ended with an error; then it is gone.
        """
        self._say({"do": do, **given})
        assert self.process.stdout is not None
        began = perf_counter()
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.process.stdout, selectors.EVENT_READ)
            ready = waiting.select(self.left)
        line = self.process.stdout.readline() if ready else ""
        self.left = max(self.left - (perf_counter() - began), 0.001)
        if line:
            return json.loads(line)
        if ready:
            self.process.wait()  # as it has ended by itself
        reason = self._reason() if ready else f"over {self.limit:,.0f} s"
        self.close()
        raise RunError(reason)

    def close(self) -> None:
        """End it, at once. Twice is no harm."""
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.words):
            with suppress(BrokenPipeError):
                file.close()

    def _say(self, words: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; whoever reads the answer finds out
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()

    def _reason(self) -> str:
        self.words.seek(0)
        lines = self.words.read().strip().splitlines() or [f"exit status {self.process.returncode}"]
        words = re.sub(r"(/[\w.+@-]+){2,}", "...", lines[-1])[:200]  # paths of one machine are nobody's business
        too_much = re.search(r"can't allocate|[Cc]annot allocate|not enough memory|MemoryError|bad_alloc", lines[-1])
        return f"over {self.memory / 2**30:.3g} GiB" if too_much or self.process.returncode == -9 else words
