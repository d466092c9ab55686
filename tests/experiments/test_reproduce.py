"""`slimgrad reproduce --quick`: whole, resumable, and with a report that needs no network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from benchmarks.measure import LiveBytes

from slimgrad.data import Batch
from slimgrad.experiments.compatibility import compare, compatibility_points
from slimgrad.experiments.regimes import train_regime
from slimgrad.experiments.tradeoff import predict_bytes, tradeoff_points
from slimgrad.models import Performer, PerformerConfig, get_preset
from slimgrad.train import config_for
from slimgrad.train.gradient import add_gradient
from tests.cli.running import INPUT, refuse, succeed


@pytest.mark.slow
def test_quick_from_nothing_then_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    succeed("reproduce", "--quick", "--out", out)
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert len(rows) == 12 + 6
    assert all("result" in row for row in rows)
    assert len((out / "tradeoff.csv").read_text().splitlines()) == 1 + 12
    runs = [row for row in rows if row["experiment"] == "compatibility"]
    table = {entry["regime"]: entry for entry in compare(runs)}
    noise = table["plain-seed1"]["curve_mean"]
    others = [entry["curve_mean"] for name, entry in table.items() if not name.startswith("plain")]
    assert len(others) == 4
    assert 0 < max(others) < noise / 100
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "src=" not in page
    assert "<link" not in page
    written = {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "0:00:00 left" in succeed("reproduce", "--quick", "--out", out).output
    assert written == {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "found {'scale'" in refuse(INPUT, "reproduce", "--out", out)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert "tradeoff, copying, ptb" in refuse(INPUT, "reproduce", "--only", "speech", "--out", tmp_path / "out")
    assert "at most 1" in refuse(INPUT, "reproduce", "--scale", 2, "--out", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "Name another folder" in refuse(INPUT, "reproduce", "--quick", "--out", tmp_path / "mine")


def test_every_point_of_the_trade_off_is_there_once() -> None:
    points = tradeoff_points()
    # plain, layers twice, and the powers of two from 16 to L: 10, 7, 9 and 11 of them, in three forms
    assert len({point.file for point in points}) == len(points) == 3 * (4 * 2 + 10 + 7 + 9 + 11)


@pytest.mark.parametrize("form", ["blocked", "iterative", "prefix_sum"])
def test_the_predicted_graph_is_what_autograd_keeps(form: str) -> None:
    """Peak bytes of tensors per token, in the last layer but one: there only the layer's graph is added."""
    per_layer = [live_bytes(form, layers) for layers in (1, 2)]
    config = PerformerConfig(layers=1, width=64, heads=1, form=form)
    deeper = dataclasses.replace(config, layers=2)
    predicted = predict_bytes(deeper, 1, "plain", 1) - predict_bytes(config, 1, "plain", 1)
    assert per_layer[1] - per_layer[0] == predicted
    assert per_layer[0] == pytest.approx(predict_bytes(config, 1, "plain", 1), rel=0.01)  # with the way back: 0.2 % off


def live_bytes(form: str, layers: int) -> float:
    """Per token: the slope between two lengths, so that what does not grow with them drops out."""
    peaks: list[int] = []
    for length in (512, 1024):
        model = Performer(PerformerConfig(layers=layers, width=64, heads=1, form=form))
        tokens = torch.zeros(1, length, dtype=torch.uint8)
        batch = Batch(tokens, tokens.to(torch.int16))
        for _ in range(2):  # the first makes what is made once
            with LiveBytes() as live:
                add_gradient(model, batch, method="plain", chunk=length, schedule=None, normalizer=length)
        peaks.append(live.peak)
    return (peaks[1] - peaks[0]) / 512


def test_published_settings_and_one_share_for_all() -> None:
    for task, steps in (("copying", 15_000), ("ptb", 30_000)):
        full = compatibility_points(task, scale=1.0)
        assert {point.task["config"]["steps"] for point in full} == {steps}
        short = compatibility_points(task, scale=0.05)
        assert {point.task["config"]["steps"] for point in short} == {steps // 20}
        assert len({point.file for point in (*full, *short)}) == 12


def test_a_first_half_survives_a_kill_before_its_copy(tmp_path: Path) -> None:
    config = config_for(get_preset("copying"), steps=4, length=16, chunk=4, save_every=2).to_dict()
    plain, half = tmp_path / "plain", tmp_path / "plain-half"
    undisturbed = train_regime(folder=str(plain), config=config, keep_half=True)
    first_half = {"folder": str(tmp_path / "mixed"), "config": config, "first_half": str(plain)}
    assert train_regime(**first_half)["bits"] == undisturbed["bits"]
    (tmp_path / "killed").mkdir()
    half.rename(tmp_path / "killed" / "plain")  # as a kill leaves it: the snapshot is there, its copy is not
    again = train_regime(folder=str(tmp_path / "killed" / "plain"), config=config, keep_half=True)
    assert again["bits"] == undisturbed["bits"]
    assert (tmp_path / "killed" / "plain-half" / "config.json").exists()
