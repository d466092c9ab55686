"""The base of a Hugging Face model as a causal step: tokens in, hidden states out, its cache as the state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from slimgrad.errors import ModelError
from slimgrad.hf.attention import attending, configs_of
from slimgrad.hf.cache import FunctionalCache, LayerKind, kinds_of
from slimgrad.hf.rope import fixed_frequencies
from slimgrad.states.rows import Growing
from slimgrad.sweep import tree
from slimgrad.sweep.graphless import keeps_no_graph
from slimgrad.sweep.random import seeded

CACHE_NAMES = ("past_key_values", "cache_params")
Around = Callable[[], AbstractContextManager[Any]]
_MAKES_LEAVES = "make_inputs_require_grad"  # the name of that hook in transformers, PEFT and TRL
_PROBED = 3  # tokens; more than one, since many models take another path for a single one


class BaseStep(nn.Module):
    """`forward(inputs, state) -> (outputs, next state)` through the model's own forward and cache.

    Args:
        base: the module that is handed the cache.
        config: the model's, which says what its cache consists of.
        chunk: tokens per chunk.
        counts_from_chunk: the model counts positions from the start of what it is given: they are passed.
        attention: the attention function of its layers while a chunk runs; None: their own.

    Attributes:
        output_type: what the base returns.
    """

    output_type: type[Any]

    def __init__(
        self,
        base: nn.Module,
        config: Any,
        *,
        chunk: int,
        counts_from_chunk: bool = False,
        attention: str | None = None,
    ) -> None:
        super().__init__()
        self.attention, self._configs = attention, configs_of(base)
        self.base, self.config, self.chunk, self.counts_from_chunk = base, config, chunk, counts_from_chunk
        names = inspect.signature(type(base).forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in names), CACHE_NAMES[0])
        self.takes_positions = "position_ids" in names or any(p.kind is p.VAR_KEYWORD for p in names.values())
        self.routes = False  # whether router logits are wanted beside hidden states
        self.around: Around = nullcontext  # in which each chunk runs
        self._kinds: dict[Any, list[LayerKind]] = {}

    def original(self, **kwargs: Any) -> Any:
        """The base model's own forward, as its class has it."""
        return cast(Any, type(self.base)).forward(self.base, **kwargs)

    def set_to_themselves(self) -> list[Tensor]:
        """Frozen weights that PEFT adapts by a parametrization which it registers in every forward (experts)."""
        wrappers = [module for module in self.base.modules() if type(module).__name__ == "ParamWrapper"]
        return [p for p in (cast(Any, module).get_param() for module in wrappers) if not p.requires_grad]

    def prepare(self) -> None:
        """What the model does to itself at the start of a pass, before the first chunk of one."""

    def new_cache(self) -> Any:
        """The cache that the model fills when it is probed."""
        return DynamicCache(config=self.config)

    def kinds(self) -> list[LayerKind]:
        """What its cache consists of: seen on a few tokens, once for each dtype and device."""
        weight = next(self.base.parameters())
        kind = weight.device.type
        key = (weight.device, weight.dtype, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        if key not in self._kinds:
            cache = self.probe(weight.device)
            self._kinds[key] = self.kinds_in(cache)
        return self._kinds[key]

    def kinds_in(self, cache: Any) -> list[LayerKind]:
        """What a cache that was filled by the model consists of."""
        return kinds_of(cache, self.chunk)

    def probe(self, device: torch.device) -> Any:
        """The model's own cache after a few tokens."""
        cache, tokens = self.new_cache(), torch.zeros(1, _PROBED, dtype=torch.long, device=device)
        with torch.no_grad(), seeded(0, device), self.within_a_sweep(_PROBED):
            found = self.original(input_ids=tokens, use_cache=True, **{self.cache_name: cache})
        self.output_type = type(found)
        if getattr(found, self.cache_name, None) is not cache:
            raise ModelError(
                f"{type(self.base).__name__} does not hand back the cache that it is given; expected its state in "
                "transformers' cache. See docs/huggingface.md for what can be swept"
            )
        return cache

    def initial_state(self, batch_size: int) -> tree.Tree:
        """What each layer starts from (no rows, zeros for convolutions and recurrences), position 0."""

        def empty(leaf: Any) -> Any:
            value = leaf.value if isinstance(leaf, Growing) else leaf
            whole = value.expand(batch_size, *value.shape[1:]).clone()
            return Growing(whole) if isinstance(leaf, Growing) else whole

        return {"layers": [tree.map_leaves(empty, one.empty) for one in self.kinds()], "position": 0}

    def forward(self, inputs: dict[str, Tensor], state: Any) -> tuple[dict[str, Any], Any]:
        """One chunk.

        Args:
            inputs: `input_ids` `[batch, time]` or `inputs_embeds` `[batch, time, width]`; perhaps `position_ids`,
                `token_type_ids`.
            state: the state before it; `total` in it is the length of the sequence, where frequencies depend on that.

        Returns:
            `last_hidden_state` `[batch, time, width]`, and the state after it.
        """
        position = cast(int, state["position"])
        tokens = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
        batch, time = tokens.shape[:2]
        cache = self.bound(state)
        given: dict[str, Any] = dict(inputs)
        if self.counts_from_chunk and "position_ids" not in given:
            at = torch.arange(position, position + time, device=tokens.device)
            given["position_ids"] = at.expand(batch, time)
        if self.routes:
            given["output_router_logits"] = True
        with self.within_a_sweep(state.get("total")):
            found = self.original(use_cache=True, **{self.cache_name: cache}, **given)
        following = {**state, "layers": self.following(cache), "position": position + time}
        return self.outputs_of(found, batch, time), following

    def state_kinds(self) -> list[str]:
        """The kinds of state that its cache consists of, in words."""
        return sorted({name for kind in self.kinds() for name in kind.names()})

    def bound(self, state: Any) -> Any:
        """The cache that reads `state`."""
        return FunctionalCache(self.kinds(), state["layers"], state["position"])

    def following(self, cache: Any) -> Any:
        """The state after the chunk."""
        return cache.following()

    def outputs_of(self, found: Any, batch: int, time: int) -> dict[str, Any]:
        """What is collected along time."""
        outputs = {"last_hidden_state": found.last_hidden_state}
        router = getattr(found, "router_logits", None)
        if router:
            outputs["router_logits"] = [x.view(batch, time, -1) for x in router]
        return outputs

    @contextmanager
    def within_a_sweep(self, total: int | None) -> Generator[None]:
        """How the model has to be set while a chunk runs."""
        with (
            self._settings(total),
            _checkpointing_keeps_the_cache(self.base, lambda: self._settings(total)),
            _no_leaves_from_embeddings(self.base),
        ):
            yield

    @contextmanager
    def _settings(self, total: int | None) -> Generator[None]:
        """What a layer needs that runs once more in a chunk's backward pass."""
        frequencies = nullcontext() if total is None else fixed_frequencies(self.base, total)
        with self.around(), attending(self._configs, self.attention), frequencies:
            yield


@contextmanager
def _checkpointing_keeps_the_cache(base: nn.Module, around: Around) -> Generator[None]:
    """transformers' own activation checkpointing inside a chunk: its layers may read the cache twice, since ours do not
    write to what they read. A flag of the whole model (which would switch the cache off) is set aside, and in the first
    sweep, which keeps no graph, those of its layers too.

    A layer runs again in the chunk's backward pass, after this block: `around` is entered there anew.
    """
    layers = list[Any]()
    others = list[Any]()
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            keeps = isinstance(module, GradientCheckpointingLayer) and not keeps_no_graph()
            (layers if keeps else others).append(module)
    try:
        for layer in layers:
            layer._can_checkpoint_with_cache = True
            layer._gradient_checkpointing_func = _Checkpoint(layer._gradient_checkpointing_func, around)
        for other in others:
            other.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache
            layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.checkpoint
        for other in others:
            other.gradient_checkpointing = True


class _Checkpoint:
    """A checkpoint function whose layer runs within `around`, both times."""

    def __init__(self, checkpoint: Callable[..., Any], around: Around) -> None:
        self.checkpoint, self._around = checkpoint, around

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        def run_within(*args: Any) -> Any:
            with self._around():
                return run(*args)

        options = getattr(self.checkpoint, "keywords", {})
        # the same gradient; the reentrant way cannot say which gradients it was asked for
        again = {"use_reentrant": False} if options.get("use_reentrant") else {}
        return self.checkpoint(run_within, *args, **again)


@contextmanager
def _no_leaves_from_embeddings(base: nn.Module) -> Generator[None]:
    """`enable_input_require_grads` makes the embedding's output a leaf by a hook, which a sweep sets aside."""
    aside: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in base.modules():
        hooks = cast("dict[int, Any]", module._forward_hooks)  # pyright: ignore[reportPrivateUsage]
        kept = {k: x for k, x in hooks.items() if _MAKES_LEAVES not in getattr(x, "__qualname__", "")}
        if len(kept) < len(hooks):
            aside.append((hooks, dict(hooks)))
            hooks.clear()
            hooks.update(kept)
    try:
        yield
    finally:
        for hooks, before in aside:
            hooks.clear()
            hooks.update(before)
