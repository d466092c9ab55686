"""Snapshots are whole or absent, and what is read back is what was written, in every bit."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimgrad import InputError, StorageError
from slimgrad.bytelm import build_model
from slimgrad.bytelm.optimizer import make_optimizer
from slimgrad.models import Performer
from slimgrad.runs import snapshot
from slimgrad.runs.optimizer_state import pack, unpack
from slimgrad.runs.snapshot import list_snapshots, read_snapshot, restore, save_snapshot
from slimgrad.runs.tensors import read_tensors
from tests.bytelm.settings import SNAPSHOT_FILES, flip, tiny


def trained(seed: int = 0) -> tuple[Performer, torch.optim.Optimizer]:
    """A model and an optimiser that has taken a step."""
    model = build_model(tiny(seed=seed))
    optimizer = make_optimizer(tiny(), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int, seed: int = 0) -> Path:
    model, optimizer = trained(seed)
    return save_snapshot(folder, step=step, model=model, optimizer=optimizer, noted={"bytes_seen": 10 * step})


def test_what_was_written_is_read_back_in_every_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    found = read_snapshot(path)
    assert (found.path, found.step, found.noted) == (path, 7, {"bytes_seen": 70})
    assert found.environment == snapshot.describe_environment()
    model = build_model(tiny(seed=1))
    optimizer = make_optimizer(tiny(), model)
    restore(found, model, optimizer)
    expected_model, expected_optimizer = trained()
    for name, value in expected_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ours, our_rest = pack(model, optimizer)
    theirs, their_rest = pack(expected_model, expected_optimizer)
    assert our_rest == their_rest
    assert ours.keys() == theirs.keys()
    assert {name.partition(":")[2] for name in ours} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_equal_states_leave_equal_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, 3) for name in "ab"]
    for name in SNAPSHOT_FILES:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes()


def test_the_latest_two_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert [path.name for path in list_snapshots(tmp_path)] == ["step-00000011", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", SNAPSHOT_FILES)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = save(tmp_path, 3)
    damage(path / name)
    with pytest.raises(InputError, match=rf"snapshot .*step-00000003 is damaged: .*{name}"):
        read_snapshot(path)


def test_a_changed_step_does_not_pass_for_a_snapshot(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    record = json.loads((path / "snapshot.json").read_text())
    (path / "snapshot.json").write_text(json.dumps(record | {"step": 4}))
    with pytest.raises(InputError, match="does not match its own checksum"):
        read_snapshot(path)


def test_a_model_with_other_parameters_is_refused(tmp_path: Path) -> None:
    found = read_snapshot(save(tmp_path, 3))
    for other, message in (
        (nn.Linear(2, 2), r"expected the tensors \['bias', 'weight'\], found others or other shapes"),
        (build_model(tiny()).double(), r"expected .* in torch\.float64, found torch\.float32"),
    ):
        with pytest.raises(InputError, match=message):
            restore(found, other, torch.optim.SGD(other.parameters()))


class Tied(nn.Module):
    """A language model whose head is its embedding, and a buffer that is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("first", self.embed.weight.detach()[:2])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


class Nested(torch.optim.Optimizer):
    """Momentum in float32 whatever the parameter's dtype, in a dictionary within a list, beside None and words."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {
                        "nested": [{"momentum": torch.zeros(p.shape)}],
                        "none": None,
                        "word": "one",
                        "count": (0,),
                    }
                momentum = state["nested"][0]["momentum"]
                momentum.mul_(0.9).add_(p.grad.float())
                state["count"] = (state["count"][0] + 1,)
                p.data.sub_((group["lr"] * momentum).to(p.dtype))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW, a rate that is a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "nested": Nested,
}


# LBFGS multiplies by numbers that bfloat16 has not
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIMIZERS), *((n, torch.bfloat16) for n in OPTIMIZERS if n != "LBFGS")],
)
def test_any_optimiser_goes_on_in_every_bit_tied_weights_included(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tokens = torch.arange(7)

    def made(seed: int) -> tuple[Tied, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = Tied().to(dtype)
        return model, OPTIMIZERS[name](model.parameters())

    def step(model: Tied, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    model, optimizer = made(0)
    for _ in range(3):
        step(model, optimizer)
    optimizer.param_groups[0]["lr"] *= 0.5
    path = save_snapshot(tmp_path, step=3, model=model, optimizer=optimizer)
    again, other = made(1)
    restore(read_snapshot(path), again, other)
    assert again.head.weight is again.embed.weight
    for _ in range(2):
        step(model, optimizer)
        step(again, other)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert set(read_tensors(path / "model.safetensors")) == {"embed.weight", "first", "head.bias"}


def test_what_cannot_be_stored_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    first = next(iter(model.parameters()))
    optimizer.state[first]["odd"] = {1, 2}
    with pytest.raises(InputError, match=r"optimiser state embed\.weight:odd: expected tensors, .*, got set"):
        save_snapshot(tmp_path, step=1, model=model, optimizer=optimizer)
    with pytest.raises(InputError, match="expected parameters of the model alone, found 2 that it has not"):
        save_snapshot(tmp_path, step=1, model=model, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()))
    assert list(tmp_path.iterdir()) == []


def test_optimiser_files_of_earlier_versions_load(tmp_path: Path) -> None:
    model, optimizer = trained()
    tensors, _ = pack(model, optimizer)
    other = make_optimizer(tiny(learning_rate=0.5), model)
    unpack(model, other, tensors, None)
    assert all(torch.equal(value, tensors[name]) for name, value in pack(model, other)[0].items())
    assert other.param_groups[0]["lr"] == 0.5


class Killed(BaseException):
    """Nothing that the code could catch by name."""


# everything that writing a snapshot calls and that a disk may refuse, and how often
WRITES = {
    (Path, "mkdir"): 1,
    (snapshot, "save_tensors"): 2,
    (snapshot, "sha256"): 2,
    (Path, "write_text"): 1,
    (snapshot, "push_to_disk"): 5,
    (Path, "rename"): 1,
}
PLACES = [(*place, calls) for place, times in WRITES.items() for calls in range(times)]
REMOVAL = [(Path, "rename", 1), (shutil, "rmtree", 1), (shutil, "rmtree", 2)]


def fail(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, error: BaseException) -> Callable[[], int]:
    """Have a function raise from its call number `calls` (from 0) on; how often it was called."""
    whole, count = getattr(owner, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return whole(*arguments, **options)

    patch.setattr(owner, name, failing)
    return lambda: count


def named(place: tuple[Any, str, int]) -> str:
    return f"{place[1]}-{place[2]}"


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, place: tuple[Any, str, int]) -> None:
    save(tmp_path, 1)
    step = "step-00000002"
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, *place, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(StorageError, match=rf"{step}: expected to write it, got: No space left on device\. Free"):
            save(tmp_path, 2)
    last = place == (snapshot, "push_to_disk", 4)  # of the folder's names: the snapshot itself is whole
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", *([step] if last else [])}
    assert all(read_snapshot(path) for path in tmp_path.iterdir())


@pytest.mark.parametrize("place", PLACES + REMOVAL, ids=named)
def test_a_kill_between_any_two_writes_leaves_whole_snapshots(tmp_path: Path, place: tuple[Any, str, int]) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with pytest.MonkeyPatch.context() as patch:
        if place[0] is not shutil:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process tidies nothing up
        called = fail(patch, *place, Killed())
        with pytest.raises(Killed):
            save(tmp_path, 3)
        assert called() > place[2]
    found = list_snapshots(tmp_path)
    assert len(found) >= 2
    assert [read_snapshot(path).step for path in found] in ([2, 1], [3, 2], [3, 2, 1])
    following = read_snapshot(found[0]).step + 1
    save(tmp_path, following)
    assert [read_snapshot(path).step for path in list_snapshots(tmp_path)] == [following, following - 1]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE refuses a large file on Linux")
def test_a_file_that_the_system_refuses_to_let_grow_is_a_storage_error(tmp_path: Path) -> None:
    program = (
        "import resource, sys, pathlib\n"
        "from slimgrad import StorageError\n"
        "from tests.runs.test_snapshot import save\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "save(folder, 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    save(folder, 2)\n"
        "except StorageError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=root)
    assert "step-00000002: expected to write it, got: " in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_snapshot(tmp_path / "step-00000001").step == 1
