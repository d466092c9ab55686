"""A segment on the device, saved at any chunk, loaded and finished: the same in every bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import slimgrad as sg
from slimgrad.call.identity import environment
from tests.call import segments
from tests.cuda.device import DEVICE, PLACES, SCHEDULES, moved, on_cuda_only
from tests.cuda.lives import begun, built, live, result_of

ROOT = Path(__file__).parents[2]


def stopped_at(event: int, folder: Path, kind: str, schedule: str, store: str) -> None:
    one, count = begun(kind, schedule, store), 0
    if event == 0:
        one.save(folder)
        return

    def on_chunk(_: sg.Event) -> None:
        nonlocal count
        count += 1
        if count == event:
            one.save(folder)
            raise KeyboardInterrupt

    one.on_chunk = on_chunk
    with pytest.raises(KeyboardInterrupt):
        segments.finished(one)


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", segments.MODELS)
def test_saved_and_loaded_is_the_same_in_every_bit(kind: str, schedule: str, store: str, tmp_path: Path) -> None:
    expected = result_of(begun(kind, schedule, store))
    for event in (0, 2, 5, 7, 9):
        folder = tmp_path / str(event)
        stopped_at(event, folder, kind, schedule, store)
        model = built(kind)
        one = sg.Segment.load(folder, model, moved(segments.TOKENS), loss_fn=segments.counted)
        found = result_of(one)
        assert segments.different(found, expected) == [], event
        assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {DEVICE.type}


@pytest.mark.parametrize(("schedule", "store"), [("Rebuild", "device"), ("Binomial", "disk")])
def test_kills_change_no_bit(schedule: str, store: str, tmp_path: Path) -> None:
    setting = ["a mix", schedule, store]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    for kill_after in (3, 5):
        command = [sys.executable, "-m", "tests.cuda.lives", str(tmp_path), *setting, str(kill_after)]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    live(tmp_path, "a mix", schedule, store, 0)
    got = torch.load(tmp_path / "result.pt", weights_only=False)
    assert segments.different(got, result_of(begun(*setting))) == []


def test_segments_in_a_row() -> None:
    """One holds the first half, one the second: state forward, its gradient back."""
    tokens, targets = moved(segments.TOKENS), moved(segments.TARGETS)
    for kind in ("sums", "rows", "gates"):
        model = built(kind).eval()
        total = int((targets != -100).sum())
        outputs, _ = model(tokens, model.initial_state(2))
        F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        first = sg.Segment(model, tokens[:, :20], targets[:, :20], chunk=8)
        second = sg.Segment(model, tokens[:, 20:], targets[:, 20:], chunk=8, state=first.forward())
        second.forward()
        result = second.reverse(1 / total)
        first.reverse(1 / total, result.initial_state_grad)
        for name, p in model.named_parameters():
            error = float((p.grad - expected[name]).norm()) / float(expected[name].norm())
            assert error <= 1e-12, (kind, name, error)


@on_cuda_only
def test_what_decides_the_bits_names_the_device() -> None:
    """Another kind of GPU has other kernels: what was saved on one is refused on another, before work is lost."""
    found = environment(torch.empty(0, device=DEVICE).device)
    assert any(torch.cuda.get_device_name(DEVICE) in str(value) for value in found.values()), found
