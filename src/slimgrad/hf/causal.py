"""The causal model's forward: given labels in training, its head in pieces, so that logits are never all there."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from slimgrad.call.guard import backward_hooks
from slimgrad.errors import ModelError
from slimgrad.hf.base import BaseForward
from slimgrad.hf.batch import DOCUMENTS, refuse_cache, refuse_targets_at_padding
from slimgrad.hf.certificate import Certificate
from slimgrad.hf.head import IGNORED, LossOutput, NoCache, linear_loss, loss_in_pieces
from slimgrad.hf.instance import InstanceForward, is_bare
from slimgrad.hf.put_on import made_of
from slimgrad.hf.smoke import head_agrees, is_elsewhere
from slimgrad.states.values import is_plain_value


class CausalForward(InstanceForward):
    """The causal model's: given labels in training, its head in pieces."""

    def __init__(self, inner: nn.Module, base: BaseForward, certificate: Certificate) -> None:
        super().__init__(inner)
        self.base, self.certificate = base, certificate
        self.agrees = True  # whether the head in pieces gave the model's own loss when they were compared
        self.looked_at: tuple[dict[int, Any], dict[str, Any]] | None = None  # what the head was made of then

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.by_name(args, kwargs)
        if self.is_training() and self.module.get_submodule(self.certificate.base) is not self.base.module:
            raise ModelError(
                f"{self.certificate.base} of {type(self.module).__name__} was replaced since slimgrad.hf.enable, which "
                "its chunks would not run. Expected slimgrad.hf.disable(model), and slimgrad.hf.enable(model) anew"
            )
        if not self.is_training():
            return self.original(*args, **kwargs)
        refuse_cache(given)
        config = cast(Any, self.module).config
        caches = given.get("use_cache") is None and getattr(config, "use_cache", False) and torch.is_grad_enabled()
        self.base.documents = {name: given[name] for name in DOCUMENTS if given.get(name) is not None}
        try:
            found = self._in_pieces(given) if self._takes_pieces(given) else self.original(*args, **kwargs)
        finally:
            self.base.documents = None
        if caches and isinstance(found, ModelOutput) and found.get("past_key_values") is None:
            cast(Any, found).past_key_values = NoCache()
        return found

    def _in_pieces(self, given: dict[str, Any]) -> LossOutput:
        labels, count, targets = (given.pop(name, None) for name in ("labels", "num_items_in_batch", "shift_labels"))
        targets = self._targets(labels) if targets is None else targets
        refuse_targets_at_padding(targets, given.get("attention_mask"))
        hidden = self.base.module(**given).last_hidden_state
        return LossOutput(loss=self._mean(hidden, targets.to(hidden.device), count))

    def _targets(self, labels: Tensor) -> Tensor:
        return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.certificate.shifts_labels else labels

    def _mean(self, hidden: Tensor, targets: Tensor, count: Any = None) -> Tensor:
        total = self._summed(hidden, targets)
        count = torch.as_tensor((targets != IGNORED).sum() if count is None else count, device=total.device)
        # without a target the loss is NaN, as the model's own, and its gradient zero
        return torch.where(count == 0, torch.nan, total / torch.where(count == 0, 1, count))

    def _takes_pieces(self, given: dict[str, Any]) -> bool:
        """Whether the loss is the cross-entropy that the certificate has seen; else the model computes its own, and so
        does a forward that was there before (Accelerate's autocast, TRL's own head).
        """
        if given.get("labels") is None or self.certificate.head == "whole" or self.previous is not None:
            return False
        outside = self._outside()
        if any(map(backward_hooks, outside)):  # they want the gradient of the whole
            return False
        path = self.certificate.base.split(".")
        between = [self.module.get_submodule(".".join(path[:n])) for n in range(1, len(path))]
        # the head in pieces is the model's own forward, in which what is around the base would act once more
        if not all(map(is_bare, between if self._is_linear() else [*between, self.base.module])):
            return False
        if given.get("output_router_logits", getattr(self.base.step.config, "output_router_logits", False)):
            return False
        if given.pop("return_dict", None) is False or not cast(Any, self.module).config.return_dict:
            return False
        if not self.certificate.shifts_labels and {"num_items_in_batch", "shift_labels"} & given.keys():
            return False  # a loss of the class' own, which looks at neither
        keeps = given.pop("logits_to_keep", 0)
        named = getattr(self.module, "loss_function", ForCausalLMLoss)
        usual = named is ForCausalLMLoss and "ignore_index" not in given and isinstance(keeps, int) and keeps == 0
        return usual and self._is_as_in_pieces(outside)

    def _outside(self) -> list[nn.Module]:
        """The modules beside the base: the head, and what is between."""
        below = set(self.base.module.modules())
        return [module for module in self.module.modules() if module is not self.module and module not in below]

    def _is_as_in_pieces(self, outside: list[nn.Module]) -> bool:
        """Whether the head in pieces gives what the model itself computes, with what has been put on it: compared again
        whenever that is another.
        """
        if self.base.checked is None or any(is_elsewhere(p) for module in outside for p in module.parameters()):
            return True
        own = {name: x for name, x in vars(self.module).items() if name != "training" and is_plain_value(x)}
        forward = type(self.module).forward
        made = made_of(outside) | {id(forward): forward}
        if self.looked_at is None or made.keys() != self.looked_at[0].keys() or own != self.looked_at[1]:
            reason = "its loss or its logits are others in one piece than in several"
            try:
                self.agrees = head_agrees(
                    self.base.module,
                    cast(Any, self.module).get_output_embeddings(),
                    lambda hidden, labels: self._around(hidden, labels=labels).loss,
                    lambda hidden, labels: self._mean(self._past_base(hidden), self._targets(labels)),
                    None if self._is_linear() else self.logits_of,
                )
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # noqa: BLE001  # a head that cannot be taken so is taken whole
                self.agrees, reason = False, f"{type(error).__name__}: {error}"
            self.looked_at = made, own
            if not self.agrees:
                warnings.warn(
                    f"the head of {type(self.module).__name__} is taken whole, with all its logits: {reason}",
                    stacklevel=2,
                )
        return self.agrees

    def __getstate__(self) -> dict[str, Any]:
        """Without what was looked at: a copy is looked at anew."""
        return vars(self) | {"looked_at": None}

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
        return self.certificate.head == "linear" and type(head) is nn.Linear and is_bare(head)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The model's own head, of hidden states `[batch, time, width]`."""
        return self._around(hidden).logits

    def _past_base(self, hidden: Tensor) -> Tensor:
        """What hooks on the base make of its hidden states."""
        self.base.handed_out = hidden
        try:
            return self.base.module(inputs_embeds=hidden).last_hidden_state
        finally:
            self.base.handed_out = None

    def _around(self, hidden: Tensor, **given: Any) -> Any:
        """The model's own forward around a base that hands out `hidden`, whatever it is given."""
        self.base.handed_out = hidden
        try:
            if "inputs_embeds" in self.__signature__.parameters:
                return self.original(inputs_embeds=hidden, use_cache=False, **given)
            tokens = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
            return self.original(input_ids=tokens, use_cache=False, **given)
        finally:
            self.base.handed_out = None
