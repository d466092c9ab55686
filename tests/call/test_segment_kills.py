"""SIGKILL at any moment of both sweeps; a new process loads what was saved: in the end it is the same in every bit.

`python -m tests.call.test_segment_kills <folder>` runs the chains of lives, each a process of its own (forked: torch is
imported once), and prints when each was killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import slimgrad as sg
from tests import lives
from tests.call.segments import CHUNK, bits, built, counted, different, finished

KILLS, CHUNKS, SAVED_EVERY = 10, 24, 3
TOKENS = torch.arange(2 * CHUNK * CHUNKS).reshape(2, -1) * 7 % 11
LENGTH = TOKENS.shape[1]
PLACES = ("device", "disk")
SCHEDULES: dict[str, Callable[..., sg.Schedule]] = {
    "Rebuild": sg.Rebuild,
    "Every": partial(sg.Every, 4),
    "Binomial": partial(sg.Binomial, 2),
}
# each kind under each schedule, each schedule on device and disk, each kind on device and disk
CHAINS = [
    (kind, schedule, PLACES[(i + j) % 2])
    for i, kind in enumerate(("sums", "rows", "gates", "a mix"))
    for j, schedule in enumerate(SCHEDULES)
]


def begin(kind: str, schedule: str, place: str) -> sg.Segment:
    model = built(kind)
    torch.manual_seed(5)
    return sg.Segment(
        model, TOKENS, chunk=CHUNK, schedule=SCHEDULES[schedule](store=place, rows=place), loss_fn=counted
    )


def live(folder: Path, chain: tuple[str, str, str], pipe: int) -> None:
    """One life: go on from what was saved, save after every third chunk, say all of it, and write the result."""
    saved, count = folder / "saved", 0

    def say(what: str, event: sg.Event) -> None:
        in_second = 2 * LENGTH - event.start if event.phase == "reverse" else LENGTH + 1
        tokens = event.stop if event.phase == "forward" else in_second
        os.write(pipe, f"{what} {tokens}\n".encode())

    def on_chunk(event: sg.Event) -> None:
        nonlocal count
        count += 1
        say(event.phase, event)
        if count % SAVED_EVERY == 0:
            say("saving", event)
            one.save(saved)
            say("saved", event)

    if (saved / "segment.json").exists():
        one = sg.Segment.load(saved, built(chain[0]), TOKENS, loss_fn=counted)
    else:
        one = begin(*chain)
    one.on_chunk = on_chunk
    torch.save(bits(one._call.model, finished(one)), folder / "result.pt")


def killed(folder: Path, chain: tuple[str, str, str], draw: random.Random) -> list[str]:
    """What ten lives said last before they were killed. The eleventh has brought the result."""
    moments = sorted(draw.uniform(0, 0.9 * 2 * LENGTH) for _ in range(KILLS))  # in tokens of both sweeps
    was: list[str] = []
    while True:
        child, reading = lives.begin(live, folder, chain)
        said = ["loading 0"]
        with os.fdopen(reading) as pipe:
            if len(was) < KILLS:
                if len(was) % 5 != 4:  # the others perhaps before their first chunk
                    for line in pipe:
                        said.append(line)
                        if float(line.split()[1]) >= moments[len(was)]:
                            break
                time.sleep(draw.choice((0.0, draw.uniform(0, 0.005))))
                os.kill(child, signal.SIGKILL)
            said += pipe
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGKILL:
            was.append(said[-1].strip())
        elif status != 0:
            raise RuntimeError(f"{chain}: a life ended with {status}")
        elif len(was) == KILLS:
            return was
        # else it was done before the signal came: from the last save once more


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    draw, found = random.Random(0), list[list[str]]()
    for number, chain in enumerate(CHAINS):
        place = folder / str(number)
        place.mkdir()
        found.append(killed(place, chain, draw))
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_ten_kills_change_no_bit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.call.test_segment_kills", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        # what a killed process left of its stores goes with the folder
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout)
    for number, (chain, was) in enumerate(zip(CHAINS, moments, strict=True)):
        assert len(was) == KILLS
        one = begin(*chain)
        expected = bits(one._call.model, finished(one))
        got = torch.load(tmp_path / str(number) / "result.pt", weights_only=False)
        assert different(got, expected) == [], chain
    counts = Counter(moment.split()[0] for was in moments for moment in was)
    print(f"{counts.total()} kills in {len(CHAINS)} chains, by what was said last: {dict(counts)}")
    where = [float(moment.split()[1]) for was in moments for moment in was if not moment.startswith("loading")]
    second = sum(tokens > LENGTH for tokens in where)
    print(f"{len(where) - second} in the first sweep, {second} in the second")
    assert len(where) >= 0.8 * counts.total()
    assert min(second, len(where) - second) > len(where) / 4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
