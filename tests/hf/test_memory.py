"""What is alive after a gradient, and between two chunks of the way back, where no garbage collector runs.

A chunk's graph that only the collector frees is memory that a GPU does not have: all is freed by reference counts.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers")

import slimgrad  # noqa: E402
import slimgrad.hf  # noqa: E402
from slimgrad.hf import cache, shrink, step  # noqa: E402
from tests.hf.models import KINDS, tokens  # noqa: E402

CHUNKS = 5
CHUNK = {"deepseek": 16}  # a multiple of the tokens that it compresses into one, so that states are of one size
ODD = 13


def deepseek() -> Any:
    config = transformers.DeepseekV4Config(hc_sinkhorn_iters=2, num_hidden_layers=4)
    return transformers.DeepseekV4ForCausalLM(type(config)(**shrink.shrunk_fields(config, {})))


SMALL = ("llama", "window", "mamba2", "hybrid")
MODELS = {**{kind: KINDS[kind] for kind in SMALL}, "deepseek": deepseek}


class Live(TorchDispatchMode):
    """Bytes of all that an operation has given out and that something still holds, autograd's graph included."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                self._known[ref.cdata] = ref, storage.nbytes()
        return found

    def bytes(self) -> int:
        self._known = {key: one for key, one in self._known.items() if not one[0].expired()}
        return sum(size for _, size in self._known.values())


@pytest.fixture(autouse=True)
def _without_the_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def measured(kind: str, *, checkpointed: bool, rows: str | None) -> tuple[list[int], list[int]]:
    """Bytes after each of three gradients; and of the last one, where each chunk starts: forth, then back."""
    chunk = CHUNK.get(kind, ODD)
    model, ids = MODELS[kind]().train(), tokens(1, chunk * CHUNKS)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    schedule = None if rows is None else slimgrad.Rebuild(rows=rows)
    slimgrad.hf.enable(model, chunk=chunk, schedule=schedule, check=False)
    live, after, starts = Live(), list[int](), list[int]()
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: starts.append(live.bytes()))
    with live:
        for _ in range(3):
            starts.clear()
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            after.append(live.bytes())
    print(kind, after, starts)
    return after, starts


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("kind", "rows"), [*((kind, rows) for kind in SMALL for rows in (None, "host")), ("deepseek", None)]
)
def test_nothing_is_kept(kind: str, rows: str | None, checkpointed: bool) -> None:
    after, starts = measured(kind, checkpointed=checkpointed, rows=rows)
    assert len(set(after)) == 1
    assert len(starts) == 2 * CHUNKS
    back = starts[CHUNKS + 1 :]  # the first one begins without the weights' gradients
    assert all(later <= earlier for earlier, later in pairwise(back))


@pytest.mark.parametrize("kind", SMALL)
def test_a_cache_that_holds_its_chunks_graph_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpointed layer holds the cache, and the cache what the layer gave: in the first sweep, which no backward
    pass follows, for good.
    """
    monkeypatch.setattr(cache.FunctionalCache, "following", lambda self: [layer.after for layer in self.layers])
    monkeypatch.setattr(step, "keeps_no_graph", lambda: False)
    after, _ = measured(kind, checkpointed=True, rows=None)
    assert after[0] < after[1] < after[2]


def test_a_graph_that_is_held_until_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    held, own = list[Any](), step.BaseStep.outputs_of

    def outputs_of(self: Any, found: Any, *args: Any) -> Any:
        held.append(found.last_hidden_state)
        return own(self, found, *args)

    monkeypatch.setattr(step.BaseStep, "outputs_of", outputs_of)
    _, starts = measured("llama", checkpointed=False, rows=None)
    back = starts[CHUNKS + 1 :]
    assert all(later > earlier for earlier, later in pairwise(back))
