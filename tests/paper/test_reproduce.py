"""`slimgrad reproduce --quick`: whole, resumable, and with a report that needs no network."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from benchmarks.measure import LiveBytes

from slimgrad.bytelm.gradient import add_gradient
from slimgrad.bytelm.presets import get_preset
from slimgrad.cli.app import EXPERIMENTS
from slimgrad.data import Batch
from slimgrad.errors import InputError
from slimgrad.models import Performer, PerformerConfig
from slimgrad.paper.catalogue import NAMES, all_points, labelled
from slimgrad.paper.compatibility import compare, compatibility_points
from slimgrad.paper.finetuning import compare_finetuning
from slimgrad.paper.regimes import load_text, open_finished, train_regime
from slimgrad.paper.report import TABLES
from slimgrad.paper.tradeoff import compare_times, predict_bytes, tradeoff_points
from tests.cli.running import INPUT, refuse, succeed


@pytest.mark.slow
def test_quick_from_nothing_then_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    succeed("reproduce", "--quick", "--out", out)
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows if "result" not in row] == []
    found = {name: make(rows) for name, make in TABLES.items()}
    assert {name: len(table) for name, table in found.items()} == QUICK
    for name, table in found.items():
        assert len((out / f"{name}.csv").read_text().splitlines()) == 1 + len(table)
    check_what_it_shows(found)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 + 3 + 1 + 1 + 1
    assert all(f'<h2 id="{chapter}">' in page for chapter in ("a", "b", "c", "d", "e1", "e2", "e3"))
    assert "src=" not in page
    assert "<link" not in page
    written = {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "0:00:00 left" in succeed("reproduce", "--quick", "--out", out).output
    assert written == {file: file.stat().st_mtime_ns for file in (out / "points").iterdir()}
    assert "found {'scale'" in refuse(INPUT, "reproduce", "--out", out)


# lines of each table: configurations x forms x ways; ways x (lengths + chunks) x weights; regimes; ...
QUICK = {
    "tradeoff-memory": 3 * 4,
    "tradeoff-time": 2 * 3,
    "precision": 2 * 3 * (2 + 2),
    "precision-drift": 2 * 3,
    "compatibility": 6,
    "finetuning": 2 + 4,
    "horizon": 2 * 2,
    "lengths": 4 * 2,
    "schedules": 5,
}


def check_what_it_shows(found: dict[str, list[dict[str, object]]]) -> None:
    """The claims, in small: what the report would be read for."""
    runs = {entry["regime"]: entry for entry in found["compatibility"]}
    others = [entry["curve_mean"] for name, entry in runs.items() if not name.startswith("plain")]
    assert len(others) == 4
    assert 0 < max(others) < runs["plain-seed1"]["curve_mean"] / 100
    ours = [entry for entry in found["precision"] if entry["way"] == "slimgrad"]
    assert max(entry["error"] for entry in ours) < 1e-6  # at most 5.3e-7 was measured
    right = {(entry["horizon"], entry["gradient"]): entry["accuracy"] for entry in found["horizon"]}
    assert right[64, "exact"] == right[64, "truncated"]  # one chunk: the same computation
    assert right[128, "exact"] > 0.9 > 0.3 > right[128, "truncated"]
    # at most 2.3e-7 was measured
    assert max(entry["largest_gradient_difference"] for entry in found["finetuning"] if entry["rate"] == 0.01) < 1e-5
    peaks = {(entry["state"], entry["method"]): entry["peak_mb"] for entry in found["lengths"]}
    for state in ("sums", "gates", "window", "cache"):
        assert peaks[state, "chunked"] < peaks[state, "plain"] / 2
    assert all(entry["same_bits"] for entry in found["schedules"])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"expected one of {', '.join(NAMES)}" in refuse(INPUT, "reproduce", "--only", "speech", "--out", out)
    for scale in (0, -1, "inf", "nan"):
        assert "above 0" in refuse(INPUT, "reproduce", f"--scale={scale}", "--out", out)
    assert "Leave one of them out" in refuse(INPUT, "reproduce", "--quick", "--only", "ptb", "--out", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    lacking = ("reproduce", "--only", "schedules", "--only", "ptb", "--data-dir", tmp_path / "mine", "--out", out)
    assert "expected ptb.train.txt" in refuse(INPUT, *lacking)
    assert not out.exists()  # said before any work
    assert "Name another folder" in refuse(INPUT, "reproduce", "--quick", "--out", tmp_path / "mine")


def test_the_help_names_every_part() -> None:
    assert NAMES == EXPERIMENTS


def test_the_programme_fits_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    points = all_points(only=[])
    assert len({point.file for point in points}) == len(points)
    assert not [point.name for point in points if point.name.startswith(("enwik8", "books"))]  # days, without a GPU
    books = all_points(only=["books"], data_dir=tmp_path)
    assert {point.task["config"]["steps"] for point in books} == {5000}
    assert {point.task["corpus"] for point in books} == {"books"}
    with pytest.raises(InputError, match="a folder named books"):
        load_text("books", None)
    adapted = all_points(only=["finetuning"])
    assert adapted[0].name == "ptb plain-seed0"  # the model that is adapted is trained first
    assert sum(point.task["count"] for point in adapted if " 256 rate 0.01 " in point.name) == 5000


def test_the_programme_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    points = all_points(only=[], data_dir=tmp_path)
    assert {p.name.split()[0] for p in points if p.experiment == "compatibility"} == {"copying", "ptb", "enwik8"}
    on_device = [point for point in points if point.task.get("device") == "cuda"]
    assert {point.experiment for point in on_device} == {"tradeoff", "finetuning"}
    assert not [point.name for point in on_device if point.environment]  # malloc is not what gives memory there
    timed = [point for point in on_device if "rounds" in point.task]
    assert len(timed) == 4 * 3
    assert all(set(point.task["chunks"]) >= {16, 32, 64, 128, 256} for point in timed)
    (tmp_path / "books").mkdir()
    stands_in = {point.name.split()[0] for point in all_points(only=[], data_dir=tmp_path)}
    assert "books" in stands_in
    assert "enwik8" not in stands_in


def test_every_point_of_the_trade_off_is_there_once() -> None:
    points = tradeoff_points()
    # plain, layers twice, and the powers of two from 16 to L: 10, 7, 9 and 11 of them, in three forms, one form twice;
    # then times with two settings of malloc: four configurations blocked, three in each other form
    memory, time = (3 + 1) * (4 * 2 + 10 + 7 + 9 + 11), 2 * (4 + 2 * 3)
    assert len({point.file for point in points}) == len(points) == memory + time


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


def test_names_are_for_people_alone(tmp_path: Path) -> None:
    """Whatever points are called, the tables are the same; and rows without labels get those of their point."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "reproduce" / "rows.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if "result" in row]
    assert not any("labels" in row for row in rows)  # written before there were labels
    found = labelled(rows)
    renamed = [row | {"name": f"point {number}"} for number, row in enumerate(found)]
    for name, make in TABLES.items():
        assert repr(make(renamed)) == repr(make(found)), name
        with (path.parent / f"{name}.csv").open(newline="") as file:
            for line, entry in zip(csv.DictReader(file), make(found), strict=True):
                assert line == {key: str(entry[key]) for key in line}, name
    with pytest.raises(InputError, match="point 0: expected the name of a point"):
        labelled([{"experiment": "tradeoff", "name": "point 0"}])


def test_published_settings_and_one_share_for_all() -> None:
    for task, steps in (("copying", 15_000), ("ptb", 30_000)):
        full = compatibility_points(task, scale=1.0)
        assert {point.task["config"]["steps"] for point in full} == {steps}
        short, longer = compatibility_points(task, scale=0.05), compatibility_points(task, scale=2)
        assert {point.task["config"]["steps"] for point in short} == {steps // 20}
        assert {point.task["config"]["steps"] for point in longer} == {steps * 2}
        assert len({point.file for point in (*full, *short)}) == 2 * len(full)


def test_what_takes_a_model_takes_a_finished_one(tmp_path: Path) -> None:
    config = get_preset("copying").replace(steps=4, length=16, chunk=4, save_every=2)
    train_regime(folder=str(tmp_path / "run"), config=config.to_dict(), keep_half=True)
    assert open_finished(str(tmp_path / "run"))[1] == config
    with pytest.raises(InputError, match="trained to its end, found step 2"):
        open_finished(str(tmp_path / "run-half"))
    with pytest.raises(InputError, match="found one of another"):
        train_regime(folder=str(tmp_path / "run"), config=config.replace(steps=6).to_dict())
    adapted = [point for point in all_points(only=["finetuning"]) if "rate" in point.task]
    trained = all_points(only=["finetuning"])[0]
    assert {json.dumps(point.needs) for point in adapted} == {json.dumps(trained.task["config"])}
    other = dataclasses.replace(adapted[0], needs=config.to_dict())
    assert other.file != adapted[0].file


def run_row(task: str, regime: str, seed: int, bits: list[float]) -> dict[str, object]:
    result = {
        "steps": [1, 2], "bits": bits, "validation_bits": bits, "final_bits": bits[-1], "final_accuracy": 0.5,
        "seconds": 60.0,
    }  # fmt: skip
    config = {"length": 8, "steps": 2}
    labels = {"task": task, "regime": regime, "chunk": 4, "seed": seed}
    return {"experiment": "compatibility", "labels": labels, "task": {"config": config}, "result": result}


def test_differences_beside_the_noise() -> None:
    rows = [
        run_row("copying", "plain", 0, [2.0, 1.0]), run_row("copying", "chunked", 0, [2.5, 1.0]),
        run_row("copying", "plain", 1, [3.0, 1.0]), run_row("copying", "plain", 2, [2.0, 2.0]),
    ]  # fmt: skip
    table = {entry["regime"]: entry for entry in compare(rows)}
    assert table["chunked-4-seed0"]["curve_mean"] == 0.25
    assert table["chunked-4-seed0"]["of_noise"] == 0.5  # the other seeds: 0.5 each
    assert table["plain-seed0"]["of_noise"] == 0.0


def test_what_a_step_helps() -> None:
    def piece(first: int, before: list[float], after: list[float]) -> dict[str, object]:
        task = {"first": first, "rate": 0.01, "chunk": 4}
        result = {"before": before, "after": after, "difference": None}
        return {"experiment": "finetuning", "labels": {"model": "ptb"}, "task": task, "result": result}

    pieces = [piece(0, [3.0, 3.0], [2.0, 4.0]), piece(2, [3.0, 3.0], [1.0, 3.0])]
    (line,) = compare_finetuning([*pieces, run_row("ptb", "plain", 0, [3.0, 3.0])])
    assert line["trained"] == 2 / 30_000
    assert (line["stretches"], line["gain"], line["helped"]) == (4, 0.5, 0.5)
    # gains 1, -1, 2, 0: variance 5/3 of one, 5/12 of their mean
    assert line["gain_confidence"] == pytest.approx(1.96 * (5 / 12) ** 0.5, rel=1e-3)


def test_time_is_over_plains_in_the_same_round() -> None:
    model = dataclasses.asdict(PerformerConfig(layers=1, width=8, heads=1))
    task = {"model": model, "length": 64, "chunks": [16], "rounds": 3}
    seconds = {"plain": [1.0, 2.0, 4.0], "16": [2.0, 3.0, 4.4]}
    labels = {"configuration": "small", "form": "blocked", "malloc": "warm"}
    row = {"experiment": "tradeoff", "labels": labels, "task": task, "result": {"seconds": seconds}}
    plain, ours = compare_times([row])
    assert (plain["of_plain_time"], plain["method"]) == (1.0, "plain")
    assert (ours["of_plain_time"], ours["least"], ours["most"]) == (1.5, 1.1, 2.0)
    assert (ours["malloc"], ours["seconds"], ours["chunk"]) == ("warm", 3.0, 16)


def test_a_part_leaves_the_others_in_the_report(tmp_path: Path) -> None:
    succeed("reproduce", "--quick", "--only", "schedules", "--out", tmp_path / "out")
    succeed("reproduce", "--quick", "--only", "precision", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["experiment"] for row in record["rows"]] == ["precision"] * 9 + ["schedules"] * 6
    assert record["points"] == 9 + 6


def test_a_first_half_survives_a_kill_before_its_copy(tmp_path: Path) -> None:
    config = get_preset("copying").replace(steps=4, length=16, chunk=4, save_every=2).to_dict()
    plain, half = tmp_path / "plain", tmp_path / "plain-half"
    undisturbed = train_regime(folder=str(plain), config=config, keep_half=True)
    first_half = {"folder": str(tmp_path / "mixed"), "config": config, "first_half": str(plain)}
    assert train_regime(**first_half)["bits"] == undisturbed["bits"]
    (tmp_path / "killed").mkdir()
    half.rename(tmp_path / "killed" / "plain")  # as a kill leaves it: the snapshot is there, its copy is not
    again = train_regime(folder=str(tmp_path / "killed" / "plain"), config=config, keep_half=True)
    assert again["bits"] == undisturbed["bits"]
    assert (tmp_path / "killed" / "plain-half" / "config.json").exists()
