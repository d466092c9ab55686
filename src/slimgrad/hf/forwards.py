"""The two forwards that `enable` puts on a model's instance; nothing in transformers is replaced.

That of the base model returns, in training, hidden states whose backward is the reverse sweep: whoever owns head and
loss keeps them. That of the causal model, given labels, takes its head in pieces. Everything else (generation,
evaluation, saving) is the model as it was.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from slimgrad import api
from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import decide
from slimgrad.budget.request import Request
from slimgrad.call.arguments import Options
from slimgrad.errors import ModelError
from slimgrad.hf import mends
from slimgrad.hf.batch import (
    PER_TOKEN,
    padding_token,
    read_batch,
    refuse_targets_at_padding,
    without_silent_zeros,
)
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.configured import decisive, refuse_changed
from slimgrad.hf.head import IGNORED, PIECE, LossOutput, linear_loss, loss_in_pieces
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.smoke import require_same_outputs
from slimgrad.hf.step import BaseStep
from slimgrad.sweep.schedules.base import Schedule

_USUAL_CHUNK = 1024  # where a budget chooses: windows of as many tokens and more are rows
_PLACE = "_slimgrad"  # where a module keeps its forward of ours, also below what somebody has put around it since
F_ = TypeVar("F_", bound="BaseForward | CausalForward")


def install(
    inner: nn.Module,
    certificate: Certificate,
    *,
    chunk: int | None = None,
    memory: int | str | None = None,
    schedule: Schedule | None = None,
) -> BaseForward:
    """Replace the forwards, whatever the certificate says; that of the base."""
    step = mends.step_for(inner, certificate, chunk=chunk or _USUAL_CHUNK)
    on_base = _put(BaseForward(step.base, step, certificate, schedule, chunk, memory))
    if step.base is not inner and certificate.head is not None:
        _put(CausalForward(inner, on_base, certificate))
    return on_base


def _put(forward: F_) -> F_:
    """Put a forward on its module; one that somebody has wrapped since it was disabled goes on below the wrapper."""
    module = forward.module
    known = module.__dict__.get(_PLACE)
    if known is None:
        module.__dict__[_PLACE] = module.forward = forward
    else:
        vars(known).update(vars(forward), previous=known.previous)
        forward = known
    module.__dict__["_replicate_for_data_parallel"] = _refuse_data_parallel
    return forward


def _refuse_data_parallel(*args: Any) -> Any:
    raise ModelError(
        "torch.nn.DataParallel copies the model per device, and the copies would run on the original's weights. "
        "Expected DistributedDataParallel (torchrun), or CUDA_VISIBLE_DEVICES with one device"
    )


def uninstall(inner: nn.Module) -> bool:
    """Put back what was there; whether anything was replaced."""
    found = enabled(inner)
    for ours in found:
        module = ours.module
        if module.__dict__.get("forward") is not ours:  # somebody has wrapped it since: it stays, and passes on
            ours.active = False
        else:
            del module.__dict__[_PLACE]
            del module.forward
            if ours.previous is not None:
                module.forward = ours.previous
        del module.__dict__["_replicate_for_data_parallel"]
    for module in inner.modules():
        if isinstance(module.__dict__.get("forward"), mends.MendedForward):
            del module.forward
    return bool(found)


def enabled(model: nn.Module) -> list[BaseForward | CausalForward]:
    """The forwards of ours that are active in `model`."""
    found = [module.__dict__.get(_PLACE) for module in model.modules()]
    return [one for one in found if one is not None and one.active]


@contextmanager
def evaluated_in_chunks(model: nn.Module) -> Generator[None]:
    """Within the block an enabled model is swept in eval mode and without gradients as well: a loss over any length
    without its logits, or activations of the whole length.
    """
    forwards = [one for one in enabled(model) if not one.evaluates]
    try:
        for one in forwards:
            one.evaluates = True
        yield
    finally:
        for one in forwards:
            one.evaluates = False


class _Forward:
    """A forward on an instance: an object of a class, so that copies and pickles of the module carry their own.

    Attributes:
        module: whose forward it is.
        previous: what was on the instance before (Accelerate, TRL), or None for the class' own.
        active: False after `disable` where somebody wrapped it.
        evaluates: whether calls outside of training are swept as well.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.previous, self.active = module, module.__dict__.get("forward"), True
        self.evaluates = False

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a function of the module, which is what Accelerate wraps and binds anew: it holds nothing, so that a copy
        of the module runs its own.
        """

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return module.__dict__[_PLACE](*args, **kwargs)

        forward.__dict__["__signature__"] = inspect.signature(type(self.module).forward)
        return forward

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was replaced."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return cast(Any, type(self.module)).forward(self.module, *args, **kwargs)

    def is_training(self) -> bool:
        """Whether this call is one to sweep."""
        return self.active and (self.evaluates or (self.module.training and torch.is_grad_enabled()))

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return {**self.__signature__.bind_partial(*args).arguments, **kwargs}


class BaseForward(_Forward):
    """The base model's: in training and without a cache, hidden states whose backward is the reverse sweep."""

    def __init__(
        self,
        base: nn.Module,
        step: BaseStep,
        certificate: Certificate,
        schedule: Schedule | None,
        chunk: int | None,
        memory: int | str | None,
    ) -> None:
        super().__init__(base)
        self.step, self.certificate, self.schedule = step, certificate, schedule
        self.chunk, self.memory = chunk, memory
        self.plan: Plan | None = None  # of the latest batch, where a budget chose
        self.configured = decisive(step.config)
        self.handed_out: Tensor | None = None  # hidden states that the head is asked for, instead of a pass
        self.sweeps, self.warned = 0, False
        self.checked: list[Any] | None = None  # hooks that were on the base when it was checked; None: it is not to be

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handed_out is not None:
            return self.step.output_type(last_hidden_state=self.handed_out)
        if not self.is_training():
            self._say_if_in_eval_mode(self.by_name(args, kwargs))
            return self.original(*args, **kwargs)
        config, step = self.step.config, self.step
        refuse_modules(self.module)
        refuse_changed(self.configured, config)
        given = without_silent_zeros(self.by_name(args, kwargs), self.certificate.silent_zeros)
        names = [n for n in PER_TOKEN if given.get(n) is not None and (n != "position_ids" or step.takes_positions)]
        self.certificate.require_taken(self.module, names)
        padding = padding_token(config) if self.certificate.counts_padding else None
        batch = read_batch(given, config, padding=padding, takes_positions=step.takes_positions)
        if self.checked is not None and {*map(id, hooks_in(self.module))} - {*map(id, self.checked)}:
            self.check(self.module)
        step.routes = bool(given.get("output_router_logits", getattr(config, "output_router_logits", False)))
        outputs = self.swept(batch.sequences)
        hidden = batch.assembled([one["last_hidden_state"] for one in outputs])
        found = step.output_type(last_hidden_state=hidden)
        if step.routes:
            each = zip(*[one["router_logits"] for one in outputs], strict=True)
            found["router_logits"] = tuple(batch.assembled(list(parts)).flatten(0, 1) for parts in each)
        return found

    def _say_if_in_eval_mode(self, given: dict[str, Any]) -> None:
        """Warn, once, of a pass with gradients over more than a chunk that nobody sweeps: `from_pretrained` returns
        models in eval mode.
        """
        tokens = given.get("input_ids", given.get("inputs_embeds"))
        is_long = isinstance(tokens, Tensor) and tokens.dim() > 1 and tokens.shape[1] > self.step.chunk
        wants_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.module.parameters())
        if self.warned or not (self.active and is_long and wants_gradients):
            return
        self.warned = True
        warnings.warn(
            f"{type(self.module).__name__} is in eval mode, where slimgrad leaves it as it was: this pass with "
            "gradients runs whole, in memory of the whole sequence. Call model.train() first; where no gradients are "
            "wanted, torch.no_grad()",
            stacklevel=2,
        )

    def check(self, model: nn.Module) -> None:
        """Compare the model itself, with what has been put on it, whole and in chunks (see `smoke`): when it is
        enabled, and again when a hook comes.
        """
        require_same_outputs(model, self.step)
        self.checked = hooks_in(self.module)

    def swept(self, sequences: list[dict[str, Tensor]], chunk: int | None = None) -> list[Any]:
        """What the step gives along each sequence."""
        request = self.request(sequences)
        how = decide(request, chunk=chunk or self.chunk, memory=self.memory, plan=None)
        self.plan = how.plan
        self.sweeps += len(sequences)
        bought: dict[str, Any] = (
            {"chunk": how.chunk, "schedule": self.schedule} if how.plan is None else {"plan": how.plan}
        )
        return api.outputs(self.step, sequences, state=request.options.state, **bought)

    def request(self, sequences: list[dict[str, Tensor]]) -> Request:
        """What a plan for these sequences is made for, with what a head of ours takes beside the sweep."""
        states: list[Any] | None = None
        if depends_on_length(self.module):
            states = []
            for one in sequences:
                rows, time = next(iter(one.values())).shape[:2]
                states.append({**self.step.initial_state(rows), "total": time})
        options = Options(None, 0, self.schedule, None, 1, states, None)
        return Request(
            self.step,
            sequences,
            None,
            options,
            head=True,
            differentiates=torch.is_grad_enabled(),
            reserved=self._outside(sequences),
        )

    def _outside(self, sequences: list[dict[str, Tensor]]) -> dict[str, int]:
        """What a head of ours will take beside the sweep, while hidden states and graphs live: bytes."""
        config = self.step.config.get_text_config()
        width, dtype = int(config.hidden_size), next(self.module.parameters()).dtype
        tokens = sum(next(iter(one.values())).shape[:2].numel() for one in sequences)
        pieces = min(PIECE, tokens) * int(config.vocab_size) * 4 * 3  # logits, their gradient, a copy
        weight = int(config.vocab_size) * width * 4
        return {"hidden states' gradients": 2 * tokens * width * dtype.itemsize, "head": pieces + weight}


def hooks_in(model: nn.Module) -> list[Any]:
    """The forward hooks of its modules."""
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
        for hook in hooks.values()
    ]


class CausalForward(_Forward):
    """The causal model's: given labels in training, its head in pieces."""

    def __init__(self, inner: nn.Module, base: BaseForward, certificate: Certificate) -> None:
        super().__init__(inner)
        self.base, self.certificate = base, certificate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        if self.is_training() and self.module.get_submodule(self.certificate.base) is not self.base.module:
            raise ModelError(
                f"{self.certificate.base} of {type(self.module).__name__} was replaced since slimgrad.hf.enable, which "
                "its chunks would not run. Expected slimgrad.hf.disable(model), and slimgrad.hf.enable(model) anew"
            )
        if not self.is_training() or not self._takes_pieces(given):
            return self.original(*args, **kwargs)
        labels, count, shifted = (given.pop(name, None) for name in ("labels", "num_items_in_batch", "shift_labels"))
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.certificate.shifts_labels else labels
        refuse_targets_at_padding(shifted, given.get("attention_mask"))
        hidden = self.base.module(**given).last_hidden_state
        shifted = shifted.to(hidden.device)
        total = self._summed(hidden, shifted)
        if count is None:
            count = (shifted != IGNORED).sum()
        elif isinstance(count, Tensor):
            count = count.to(total.device)
        return LossOutput(loss=total / count)

    def _takes_pieces(self, given: dict[str, Any]) -> bool:
        """Whether the loss is the cross-entropy that the certificate has seen; else the model computes its own, and so
        does a forward that was there before (Accelerate's autocast, TRL's own head).
        """
        if given.get("labels") is None or self.certificate.head == "whole" or self.previous is not None:
            return False
        path = self.certificate.base.split(".")
        between = [self.module.get_submodule(".".join(path[:n])) for n in range(1, len(path))]
        # the head in pieces is the model's own forward, in which what is around the base would act once more
        if not all(map(_is_bare, between if self._is_linear() else [*between, self.base.module])):
            return False
        if given.get("output_router_logits", getattr(self.base.step.config, "output_router_logits", False)):
            return False
        if given.pop("return_dict", None) is False or not cast(Any, self.module).config.return_dict:
            return False
        if not self.certificate.shifts_labels and {"num_items_in_batch", "shift_labels"} & given.keys():
            return False  # a loss of the class' own, which looks at neither
        keeps = given.pop("logits_to_keep", 0)
        named = getattr(self.module, "loss_function", ForCausalLMLoss)
        return named is ForCausalLMLoss and "ignore_index" not in given and isinstance(keeps, int) and keeps == 0

    def _summed(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = cast(Any, self.module).get_output_embeddings()
        if self._is_linear():
            return linear_loss(hidden.flatten(0, 1), targets.flatten(), head)
        below = {id(p) for p in self.base.module.parameters()}
        own = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set[int]()
        parameters = [p for p in self.module.parameters() if p.requires_grad and (id(p) not in below or id(p) in own)]
        if not torch.is_grad_enabled():
            parameters = []
        return loss_in_pieces(hidden, targets, self.logits_of, parameters)

    def _is_linear(self) -> bool:
        head = cast(Any, self.module).get_output_embeddings()
        return self.certificate.head == "linear" and type(head) is nn.Linear and _is_bare(head)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The model's own head: its forward around a base that hands out `hidden` `[batch, time, width]`."""
        self.base.handed_out = hidden
        try:
            return self.original(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self.base.handed_out = None


def refuse_modules(base: nn.Module) -> None:
    """Raise where a module cannot run in chunks: its weights are replaced while it runs, or it counts tokens."""
    for name, module in base.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{name or type(module).__name__} has a hook of Accelerate's that moves weights between devices "
                "(device_map, offload), so a chunk's gradient would go to copies. Load the model on one device"
            )
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise ModelError(
                f"{name or type(module).__name__} is a unit of fully_shard, which replaces its weights when it runs: "
                "in chunks their gradients would be lost. Expected the whole model as the only unit: "
                "fully_shard(model), on a model with a head, without sharding the layers below it"
            )
        if any("alora" in type(x).__name__.lower() for x in getattr(module, "lora_variant", dict[str, Any]()).values()):
            raise ModelError(
                f"{name} is an activated LoRA (alora_invocation_tokens), which counts tokens from the end of what it "
                "is given, in chunks from the end of a chunk. Expected LoRA without invocation tokens"
            )


def _is_bare(module: Any) -> bool:
    """Whether nobody has put something around a module (beside us)."""
    around = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not around and module.__dict__.get("forward") is module.__dict__.get(_PLACE)
