"""SIGKILL at any moment of a gradient's two sweeps, then `--resume`: weights, moments and metrics are the same bits.

`python -m tests.bytelm.test_gradient_kills <folder>` lives the lives of one run, each a process of its own (forked:
torch is imported once), and prints what each said last.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slimgrad import Event
from slimgrad.bytelm import RunFolder, train
from slimgrad.bytelm.folder import read_rows
from tests import lives
from tests.bytelm.settings import corpus, last_snapshot, timeless, tiny, whole
from tests.bytelm.test_journalled import ALWAYS

KILLS, LENGTH = 6, 1500
CONFIG = tiny(steps=2, length=LENGTH, chunk=32, save_every=1)  # 93 chunks a step
CHUNKS = 2 * 93


def live(run: Path, pipe: int) -> None:
    """One life: begin, or go on, saving after every chunk; say where it is."""

    def say(event: Event) -> None:
        os.write(pipe, f"{event.phase} {event.start}\n".encode())

    if (run / "config.json").exists():
        with RunFolder.reopen(run) as folder:
            train(folder.config, corpus(), run=folder, on_chunk=say, pace=ALWAYS)
    else:
        with RunFolder.create(run, "fox", {"config": CONFIG.to_dict()}) as folder:
            train(CONFIG, corpus(), run=folder, on_chunk=say, pace=ALWAYS)


def main(run: Path) -> None:
    torch.set_num_threads(1)
    draw, said, was = random.Random(0), list[str](), list[str]()
    while True:
        child, reading = lives.begin(live, run)
        with os.fdopen(reading) as pipe:
            if len(was) < KILLS:
                goal = len(said) + draw.randint(5, CHUNKS // KILLS)
                for line in pipe:
                    said.append(line.strip())
                    if len(said) >= goal:
                        break
                time.sleep(draw.choice((0.0, draw.uniform(0, 0.01))))
                os.kill(child, signal.SIGKILL)
            said += [line.strip() for line in pipe]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise RuntimeError(f"a life ended with {status}")
        was.append(said[-1])
    print(json.dumps([was, len(said)]))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_killed_six_times_in_its_gradients_a_run_ends_as_if_undisturbed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bytelm.test_gradient_kills", str(tmp_path / "killed")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    was, chunks = json.loads(done.stdout)
    print(f"killed after {was}; {chunks} chunks in all")
    assert len(was) == KILLS
    assert {moment.split()[0] for moment in was} == {"forward", "reverse"}
    assert chunks <= 2 * CHUNKS + 3 * KILLS  # none began anew
    expected = whole(tmp_path / "whole", CONFIG, corpus())
    assert timeless(read_rows(tmp_path / "killed")) == timeless(expected)
    assert last_snapshot(tmp_path / "killed") == last_snapshot(tmp_path / "whole")
    assert not (tmp_path / "killed" / "gradient").exists()
    assert not list((tmp_path / "killed").rglob(".partial-*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
