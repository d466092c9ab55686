"""The base model's forward: in training, hidden states whose backward is the reverse sweep. Whoever owns head and loss
keeps them.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad import api
from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import decide
from slimgrad.budget.request import Request
from slimgrad.call.arguments import Options
from slimgrad.errors import ModelError
from slimgrad.hf.attention import is_transformers_own
from slimgrad.hf.batch import PER_TOKEN, padding_token, read_batch, refuse_cache, without_silent_zeros
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.configured import decisive, refuse_changed
from slimgrad.hf.head import PIECE
from slimgrad.hf.instance import InstanceForward
from slimgrad.hf.put_on import made_of
from slimgrad.hf.rope import depends_on_length
from slimgrad.hf.smoke import require_same_outputs
from slimgrad.hf.step import BaseStep
from slimgrad.sweep.schedules.base import Schedule


class BaseForward(InstanceForward):
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
        self.documents: dict[str, Any] | None = None  # what the causal model around it was given to tell them apart
        self.sweeps, self.warned = 0, False
        self.checked: dict[int, Any] | None = None  # what the base was made of when it was checked; None: never

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.handed_out is not None:
            return self.step.output_type(last_hidden_state=self.handed_out)
        if not self.is_training():
            self._say_if_in_eval_mode(self.by_name(args, kwargs))
            return self.original(*args, **kwargs)
        config, step = self.step.config, self.step
        refuse_modules(self.module)
        refuse_changed(self.configured, config)
        self._refuse_attention()
        given = self.by_name(args, kwargs)
        if self.documents is None and self.certificate.head is not None:
            refuse_cache(given)
        given = (self.documents or {}) | {name: x for name, x in given.items() if x is not None}
        given = without_silent_zeros(given, self.certificate.silent_zeros)
        names = [n for n in PER_TOKEN if given.get(n) is not None and (n != "position_ids" or step.takes_positions)]
        self.certificate.require_taken(self.module, names)
        padding = padding_token(config) if self.certificate.counts_padding else None
        batch = read_batch(
            given,
            config,
            padding=padding,
            takes_positions=step.takes_positions,
            starts_anywhere=self.certificate.starts_anywhere,
        )
        step.prepare()
        self._check_what_is_new()
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

    def _refuse_attention(self) -> None:
        """Raise if attention that somebody registered would be passed by."""
        own = getattr(self.step.config, "_attn_implementation", None)
        if self.certificate.chunk_attention is not None and not is_transformers_own(own):
            raise ModelError(
                f"the attention function {own!r} is none of transformers' own, and the model was enabled with another. "
                "Expected slimgrad.hf.disable(model), and slimgrad.hf.enable(model) with that attention set"
            )

    def _check_what_is_new(self) -> None:
        if self.checked is None:
            return
        made = made_of(self.module.modules())
        if made.keys() - self.checked.keys():
            self.check(self.module)
        self.checked = made  # what was removed is let go

    def __getstate__(self) -> dict[str, Any]:
        """Without what was checked: a copy is checked anew, unless it is never to be."""
        return vars(self) | {"checked": None if self.checked is None else {}}

    def check(self, model: nn.Module) -> None:
        """Compare the model itself, with what has been put on it, whole and in chunks (see `smoke`): when it is
        enabled, and again when a hook, a module or a forward on an instance comes.
        """
        require_same_outputs(model, self.step)
        self.checked = made_of(self.module.modules())

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
            reserved=self._beside(sequences),
        )

    def _beside(self, sequences: list[dict[str, Tensor]]) -> dict[str, int]:
        """What a head of ours will take beside the sweep, while hidden states and graphs live: bytes."""
        config = self.step.config.get_text_config()
        width, dtype = int(config.hidden_size), next(self.module.parameters()).dtype
        tokens = sum(next(iter(one.values())).shape[:2].numel() for one in sequences)
        pieces = min(PIECE, tokens) * int(config.vocab_size) * 4 * 3  # logits, their gradient, a copy
        weight = int(config.vocab_size) * width * 4
        return {"hidden states' gradients": 2 * tokens * width * dtype.itemsize, "head": pieces + weight}


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
