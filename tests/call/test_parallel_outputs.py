"""DistributedDataParallel around a user's module that computes a loss of its own with slimgrad, as users wrap it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import slimgrad as sg
from tests.call.processes import refusals, run_processes
from tests.contract.contract import worst_error
from tests.toy_models import AllKinds

ROWS, LENGTH, WORLD = 4, 29, 2
WAYS = ("outputs", "token_loss", "loss", "pair", "list", "last step, an unused layer")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
]


def tokens() -> Tensor:
    return torch.randint(0, 13, (ROWS, LENGTH), generator=torch.Generator().manual_seed(9))


def plain_outputs(model: Any, inputs: Tensor) -> Tensor:
    return model(inputs, model.initial_state(len(inputs)))[0]


def each_token(outputs: Tensor, inputs: Tensor) -> Tensor:
    following = F.pad(inputs[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(outputs.transpose(1, 2), following, ignore_index=-100, reduction="none")


class Trained(nn.Module):
    """A causal model, a layer of the user's, and a loss: with slimgrad, or by plain backpropagation."""

    def __init__(self, way: str, *, plainly: bool = False) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.model, self.reward = AllKinds(), nn.Linear(13, 1)
        if "unused" in way:
            self.model.unused = nn.Linear(2, 2)
        self.double()
        self.way, self.plainly = way, plainly

    def outputs(self, inputs: Tensor) -> Tensor:
        return plain_outputs(self.model, inputs) if self.plainly else sg.outputs(self.model, inputs, chunk=7)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.way == "outputs":
            return (self.reward(self.outputs(inputs).tanh()) - inputs[..., None] / 13).square().mean()
        if self.way == "pair":
            first, second = (self.reward(self.outputs(x)[:, -1]) for x in (inputs, inputs.flip(1)))
            return -F.logsigmoid(first - second).mean()
        if self.way == "list":
            documents = [inputs[:, :11], inputs[:, 11:]]
            if self.plainly:
                found = [plain_outputs(self.model, one) for one in documents]
            else:
                found = sg.outputs(self.model, documents, chunk=7)
            return sum(self.reward(one).tanh().mean() for one in found)
        if "unused" in self.way:
            return self.reward(self.outputs(inputs)[:, -1]).square().mean()
        constant = 0 * self.reward.weight.sum() + 0 * self.reward.bias.sum()
        if self.plainly:
            return each_token(plain_outputs(self.model, inputs), inputs).sum() / (len(inputs) * (LENGTH - 1)) + constant
        if self.way == "token_loss":
            return sg.token_loss(self.model, inputs, chunk=7).sum() / (len(inputs) * (LENGTH - 1)) + constant
        return sg.loss(self.model, inputs, chunk=7) + constant


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _synchronised(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    try:
        mine = tokens()[rank * 2 : rank * 2 + 2]
        found = {(way, number): _trained(way, options, mine) for way in WAYS for number, options in enumerate(OPTIONS)}
        torch.save({"trained": found, "refused": _refusals(mine)}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _trained(way: str, options: dict[str, Any], mine: Tensor) -> dict[str, Any]:
    """The gradients of three steps, and how often each bucket was sent in each; then two steps, the first unsent."""
    trained = Trained(way)
    ddp = DistributedDataParallel(trained, bucket_cap_mb=0.0005, **options)
    sent: dict[int, int] = {}

    def send(_, bucket):  # torch looks at annotations, and these would be strings
        sent[bucket.index()] = sent.get(bucket.index(), 0) + 1
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / WORLD)

    ddp.register_comm_hook(None, send)
    steps, counts = [], []
    for _ in range(3):
        trained.zero_grad(set_to_none=False)
        sent.clear()
        ddp(mine).backward()
        steps.append(gradients(trained))
        counts.append(dict(sent))
    trained.zero_grad(set_to_none=False)
    sent.clear()
    with ddp.no_sync():
        ddp(mine).backward()
    unsent = dict(sent)
    ddp(mine).backward()
    return {"steps": steps, "counts": counts, "unsent": unsent, "both": gradients(trained), "sent": dict(sent)}


def _refusals(mine: Tensor) -> dict[str, str]:
    """What is said around the wrapper, and within its forward."""

    class Straight(Trained):
        def forward(self, inputs: Tensor, call: Callable[..., Any]) -> Any:
            return call(self.model, inputs, chunk=7)

    ddp = DistributedDataParallel(Trained("outputs"))
    inner = ddp.module.model
    straight = DistributedDataParallel(Straight("outputs"))
    ways: dict[str, Callable[[], object]] = {
        "outside outputs": lambda: sg.outputs(inner, mine, chunk=7),
        "outside token_loss": lambda: sg.token_loss(inner, mine, chunk=7),
        "outside loss": lambda: sg.loss(inner, mine, chunk=7),
        "outside backward": lambda: sg.backward(inner, mine, chunk=7),
        "outside Segment": lambda: sg.Segment(inner, mine, chunk=7),
        "inside backward": lambda: straight(mine, sg.backward),
        "inside Segment": lambda: straight(mine, sg.Segment),
        "another's outputs": lambda: straight(mine, lambda *_, chunk: sg.outputs(inner, mine, chunk=chunk)),
    }
    said = refusals(ways)
    assert not any(p.grad is not None for p in [*ddp.parameters(), *straight.parameters()])
    with torch.no_grad():  # forward only there is nothing to synchronise
        sg.outputs(inner, mine, chunk=7)
        sg.token_loss(inner, mine, chunk=7)
    sg.evaluate(inner, mine, chunk=7)
    return said


@pytest.mark.slow
def test_a_users_module_in_two_processes(tmp_path: Path) -> None:
    run_processes(_synchronised, (str(tmp_path),), WORLD)
    worst = 0.0
    for found in (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)):
        for (way, number), one in found["trained"].items():
            whole = Trained(way, plainly=True)
            whole(tokens()).backward()
            expected = gradients(whole)
            what = f"{way}, {OPTIONS[number]}"
            for got in one["steps"]:
                error, name = worst_error(got, expected)
                worst = max(worst, error)
                assert error <= 1e-12, f"{what}: {name} is off by {error:.1e}"  # measured 3e-14
            assert len(one["counts"][-1]) > 3, what
            assert all(set(counts.values()) == {1} for counts in one["counts"]), what
            # accumulated over two backward passes, sent once
            assert one["unsent"] == {}, what
            assert set(one["sent"].values()) == {1}, what
            error, name = worst_error(one["both"], {name: 2 * g for name, g in expected.items()})
            assert error <= 1e-12, f"{what}, accumulated: {name} is off by {error:.1e}"  # measured 3e-14
        for way, message in found["refused"].items():
            wanted = "slimgrad.loss, token_loss or outputs" if way.startswith("inside") else "Wrap the other way round"
            assert "DistributedDataParallel" in message, (way, message)
            assert wanted in message, (way, message)
    print("DDP around a module of the user's", worst)
