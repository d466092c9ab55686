"""Each kind of use outside of the rules is delivered right or refused by name; and each check finds its mistake.

The second test plants the mistake in the real code: without what guards the kind, a wrong number comes out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import slimgrad as sg
from slimgrad import api
from slimgrad.call import guard, losses, model, outputs, source, watch
from slimgrad.call.additive import SumCheck
from slimgrad.call.arguments import Call
from slimgrad.gradients import buffers
from slimgrad.gradients.buffers import Gather
from slimgrad.gradients.fused import Fused
from slimgrad.states import rows, values
from slimgrad.states.tensors import TensorCarrier
from slimgrad.sweep import progress, run
from slimgrad.sweep.turn import Turn
from slimgrad.sweep.witness import Witness
from tests.contract import kinds

Patch = Callable[[pytest.MonkeyPatch], None]


def replaced(owner: Any, name: str, value: Any) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


def no_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_strangers", lambda roots, known: ([], False))


def no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    no_strangers(monkeypatch)
    monkeypatch.setattr(model, "refuse_by_options", lambda model, takes: set())


def untouched(*args: Any, **options: Any) -> Any:
    return contextlib.nullcontext()


def unwatched(self: Any, method: str, call: Any, state: Any, reseeded: Any) -> Any:
    return call(state)


def unseen_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "refuse_gathered", lambda self: None)
    monkeypatch.setattr(model.SharedModel, "_gathered", lambda self: [])


def unguarded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (buffers, progress, rows):
        monkeypatch.setattr(module, "refuse_escaped", lambda gradient: None)
    monkeypatch.setattr(run, "graphless", torch.enable_grad)
    monkeypatch.setattr(buffers, "_only_inside", lambda owner: lambda gradient: None)


def any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (api, outputs):
        monkeypatch.setattr(module, "one_thread_at_a_time", untouched)


def unguarded_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    unguarded(monkeypatch)
    any_thread(monkeypatch)


def anything_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "is_plain_value", lambda x: True)


def fused_whatever_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Any) -> Any:
        from slimgrad.gradients.fused import _Embedding, _Linear

        weight, gather = self._stand_in, self._gather
        apply = _Linear.apply if self._is_linear else _Embedding.apply
        return apply(x, weight, self._parameters["bias"], gather) if self._is_linear else apply(x, weight, gather)

    monkeypatch.setattr(Fused, "__call__", forward)


uncompared_losses = replaced(Witness, "compare_loss", lambda self, span, numbers: None)


def no_copy(self: Any) -> Any:
    return self.value if self._returned is None else self._returned.detach()


def counted_narrow(targets: Any, batch: int, time: int) -> int:
    return int((targets != losses.IGNORED).sum())


KINDS: list[tuple[Callable[[], None], Patch | None]] = [
    (kinds.unsigned_targets, replaced(source, "count_targets", counted_narrow)),
    (kinds.a_mean_over_the_chunk, replaced(SumCheck, "require", lambda *args: None)),
    *((partial(kinds.a_foreign_tensor, where), no_strangers) for where in ("state", "loss", "initial state")),
    (kinds.a_parameter_kept_beside, no_strangers),
    (kinds.targets_that_require_gradients, None),
    (kinds.a_given_state_with_a_graph, replaced(Call, "deliver", lambda self, grads: self.gather.deliver())),
    (kinds.counts_within_the_chunk, no_counts),
    (kinds.a_mode_changed_between, replaced(guard.CalledWith, "restored", untouched)),
    (kinds.an_attribute_changed_between, replaced(guard.CalledWith, "restored", untouched)),
    (kinds.a_list_changed_between, uncompared_losses),
    (kinds.a_weight_changed_unseen, uncompared_losses),
    (kinds.a_frozen_weight_thawed_between, None),
    *(
        (partial(kinds.state_in_an_attribute, how), replaced(watch.Watch, "run", unwatched))
        for how in ("number", "dict", "tensor")
    ),
    (kinds.attributes_that_nobody_reads, replaced(watch, "_same_bits", lambda first, second: False)),
    (kinds.state_in_an_object, anything_goes),
    (kinds.a_state_that_begins_as_none, None),
    (kinds.a_side_loss, unguarded),
    (kinds.a_backward_within_forward, unseen_gradients),
    (kinds.a_parameter_written_on_the_way, None),
    (kinds.other_weights_by_functional_call, fused_whatever_the_weight),
    (
        kinds.an_own_gradient_within_a_backward,
        replaced(Gather, "is_own_backward", lambda self: self._graph_task is not None),
    ),
    (kinds.backward_within_autocast, None),
    (kinds.two_models_that_draw, replaced(Turn, "taken", untouched)),
    (kinds.a_second_sweep_on_a_model, any_thread),
    (kinds.a_plain_backward_beside_a_sweep, unguarded_threads),
    (kinds.a_final_state_is_a_copy, replaced(TensorCarrier, "final", no_copy)),
]


def name_of(check: Any) -> str:
    return f"{check.func.__name__}-{check.args[0]}" if isinstance(check, partial) else check.__name__


@pytest.mark.parametrize("check", [check for check, _ in KINDS], ids=name_of)
def test_right_or_refused_by_name(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "mistake"),
    [pair for pair in KINDS if pair[1]],
    ids=lambda x: name_of(x) if x in [c for c, _ in KINDS] else "",
)
def test_its_mistake_is_found(check: Callable[[], None], mistake: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, sg.SlimgradError)):
        check()
