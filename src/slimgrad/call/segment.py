"""A gradient in progress that outlives the process, or is shared by several: one sequence, or a part of one.

    segment = Segment(model, inputs, targets, chunk=4096)
    state = segment.forward()                       # the state after the last token: to whoever goes on from there
    result = segment.reverse(1 / total, gradient)   # the gradient of that state: from there

`save` writes all of it to a folder at any moment between two chunks, `load` goes on from there to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.budget.plan import Plan
from slimgrad.budget.planning import decide
from slimgrad.budget.request import Request
from slimgrad.call.arguments import DEFAULT_CHUNK, Call, Options, Result, Started, logger
from slimgrad.call.guard import CalledWith
from slimgrad.call.identity import differences, identity_of
from slimgrad.call.losses import cross_entropy_sum
from slimgrad.call.model import device_of
from slimgrad.call.parallel import one_thread_at_a_time, refuse_unsynchronised
from slimgrad.call.program import LossFn, sum_dtype
from slimgrad.call.protocol import require_causal_model
from slimgrad.call.saved_rows import SavedRows
from slimgrad.call.saving import (
    read_document,
    schedule_as_dict,
    schedule_from_dict,
    structure_as_text,
    write_document,
)
from slimgrad.errors import ConsumedError, InputError, MemoryLimitError
from slimgrad.gradients.sink import Sink
from slimgrad.states.values import packed_value, unpacked_value
from slimgrad.sweep import tree
from slimgrad.sweep.compiled import not_traced
from slimgrad.sweep.moves import FLOOR
from slimgrad.sweep.program import Event, OnChunk, refuse_nesting
from slimgrad.sweep.run import everywhere
from slimgrad.sweep.schedules.base import Schedule
from slimgrad.sweep.witness import fetch


class Segment:
    """One sequence (or part of one), and its gradient as far as it has come.

    Args:
        model, inputs, targets, context, chunk, memory, plan, schedule, loss_fn, state, on_chunk, sink: as in
            `backward`; the inputs are one sequence. In the place of a normaliser and the final state's gradient are the
            arguments of `reverse`. To save on the way, call `save` from `on_chunk`, which may be a method of the
            caller's, or set `segment.on_chunk` later.
        final_state: whether `forward` gives the state after the last token. False: it gives None, and the last chunk is
            not run forward for it.

    Attributes:
        on_chunk: called with an `Event` after every chunk, or None.

    Raises:
        InputError: as `backward`; or the inputs are a list.
        ModelError: as `backward`.

    Cost: as `backward`, and with `final_state` the last chunk once more. Between the calls a segment holds what its
    schedule keeps, and the gradients gathered so far; `.grad` is touched at the end of `reverse` only.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Any = None,
        *,
        context: Any = None,
        chunk: int | None = None,
        memory: int | str | None = None,
        plan: Plan | None = None,
        schedule: Schedule | None = None,
        loss_fn: LossFn | None = None,
        state: Any = None,
        on_chunk: OnChunk | None = None,
        sink: Mapping[str, Sink] | None = None,
        final_state: bool = True,
    ) -> None:
        refuse_unsynchronised(model)
        if isinstance(inputs, list):
            raise InputError("a Segment takes one sequence, got a list; make one Segment for each")
        self.on_chunk = on_chunk
        self._given_state, self._to_end = state, final_state
        self._loss_fn = loss_fn or cross_entropy_sum
        options = Options(context, DEFAULT_CHUNK, schedule, self._loss_fn, "targets", state, self._tell)
        request = Request(model, inputs, targets, options, sink)
        options = decide(request, chunk=chunk, memory=memory, plan=plan)
        self._call = Call(model, inputs, targets, options, gathers=True, sink=sink, collect_in="reverse")
        self._call.require_something_to_differentiate()
        program = self._call.sequences[0]
        program.compares_targets = program.data.targets is not None  # others may come with a load
        self._called_with = CalledWith(model, tree.tensors(context))
        self._started: Started = self._call.start(0, to_end=self._to_end)
        self._identity: dict[str, Any] | None = None
        self._saved: SavedRows | None = None  # where it was saved last
        self._loss_grad: float | None = None

    @property
    def phase(self) -> str:
        """How far it has come: "new", "forward" (in it), "swept" (forward), "reverse" (in it), "closed" (done)."""
        return self._started.run.progress.phase

    @property
    def num_targets(self) -> int:
        """Targets that are not ignored; those of a reader that have not been read yet are read for it."""
        return self._call.num_targets

    @not_traced
    def forward(self) -> Any:
        """Sweep forward, or go on with it.

        Returns:
            The state after the last token, without a graph; None where none was asked for.

        Raises:
            As `backward`; ConsumedError: also when `reverse` is done.
        """
        if self.phase == "closed":
            raise ConsumedError("this segment is done; make a new one for another gradient")
        if self.phase in ("new", "forward"):
            with one_thread_at_a_time(self._call.model), self._called_with.restored():
                self._started.run.forward()
                self._call.refuse_gathered()
        return self._started.run.progress.final_state if self._to_end else None

    @not_traced
    def reverse(self, loss_grad: float | Tensor | None = None, final_state_grad: Any = None) -> Result:
        """Sweep back, or go on with it, and add the gradients to `.grad`.

        Args:
            loss_grad: the cotangent of the summed loss: one over the number of targets of the *whole* sequence. None:
                of this segment's; or, going on, as it was.
            final_state_grad: the gradient of the final state, from whoever went on with it: its tree, with a tensor or
                None for each leaf. Not to be given again where the sweep goes on.

        Returns:
            A `Result`, whose loss is the summed loss times `loss_grad`, and whose `initial_state_grad` is for whoever
            holds what comes before.

        Raises:
            as `backward`; ConsumedError: before `forward` is done, or after this is.
        """
        if self.phase == "reverse" and (loss_grad is not None or final_state_grad is not None):
            raise InputError("the reverse sweep is under way with the gradients it was given; expected none to go on")
        if isinstance(loss_grad, Tensor) and loss_grad.numel() != 1:
            raise InputError(f"loss_grad: expected one number, got a tensor of shape {list(loss_grad.shape)}")
        if self.phase == "swept":
            self._loss_grad = 1.0 / max(self.num_targets, 1) if loss_grad is None else float(loss_grad)
        if self._call.gather is not None:
            self._call.gather.refuse_frozen()
        with one_thread_at_a_time(self._call.model):
            with self._called_with.restored():
                adjoint = self._reverse(final_state_grad)
            self._call.deliver([adjoint])
        return self._call.result([self._started.run.progress.final_state], [adjoint])

    def _reverse(self, final_state_grad: Any) -> Any:
        while True:
            moves, loss_grad = self._started.run.progress.moves, self._loss_grad
            before = moves.parts
            cotangent = self._cotangent()
            if self.phase == "swept" and final_state_grad is not None:
                self._started.run.progress.expect(final_state_grad)
            try:
                return self._started.reverse(everywhere(cotangent))
            except MemoryLimitError:
                parts = moves.parts if moves.parts > before else 2 * moves.parts  # more, if it was split on the way
                if self._saved is None or moves.cut.chunk // parts < FLOOR:
                    raise
            logger.warning("going on from %s, in %d parts a chunk", self._saved.folder, parts)
            self._go_on_from(*read_document(self._saved.folder, self._call.shared.device))
            self._loss_grad, self._started.run.progress.moves.parts = loss_grad, parts
            if self.phase in ("new", "forward"):
                self._started.run.forward()

    def _cotangent(self) -> Tensor:
        device = self._call.shared.device
        self._call.loss_grad = torch.tensor(self._loss_grad or 0.0, dtype=sum_dtype(device), device=device)
        return self._call.loss_grad

    @not_traced
    def save(self, folder: str | Path) -> None:
        """Write everything to a folder, in place of what was saved there before.

        Atomic: after a kill there is the old content or the new. With checksums of every byte. Memory: next to nothing;
        on disk: the states, kept states and gathered gradients. Rows of a `Growing` that were saved to the same folder
        before are not written again; their gradients are. Nothing of the model, the inputs or the loss function is
        written, but checksums by which `load` knows them.

        Raises:
            InputError: a sink that cannot be saved (see `SavedSink`), at whatever moment this is called first: call it
                once before `forward` to know.
            StorageError: there is no room. What was saved before is as it was.
            ConsumedError: the gradient is delivered, there is nothing to save.
        """
        refuse_nesting()
        self._require_savable_sinks()
        if self.phase == "closed":
            raise ConsumedError("this segment is done: its gradients are in .grad, and there is nothing to save")
        if self._identity is None:
            self._identity = identity_of(self._call, self._loss_fn) | self._called_with.settings(self._call.model)
        leaves, spec = tree.flatten(self._given_state)
        given = [packed_value(name, leaf) for name, leaf in zip(tree.paths(self._given_state), leaves, strict=True)]
        document = {
            "identity": self._identity,
            "device": self._call.shared.device,
            "chunk": self._started.program.cut.chunk,
            "schedule": schedule_as_dict(self._call.schedule),
            "loss_grad": self._loss_grad,
            "to end": self._to_end,
            "state": None if self._given_state is None else [structure_as_text(spec), given],
            "progress": self._started.run.progress.state(),
        }
        self._saved = write_document(Path(folder), document, self._saved)

    @classmethod
    @not_traced
    def load(
        cls,
        folder: str | Path,
        model: nn.Module,
        inputs: Any,
        targets: Any = None,
        *,
        context: Any = None,
        loss_fn: LossFn | None = None,
        sink: Mapping[str, Sink] | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Segment:
        """A saved segment, to go on with `forward` or `reverse` to the bits that it would have come to.

        Weights, context, the loss function's name and the software are compared at once; inputs and targets as they
        are read, span by span, with what was read for the span before. The gradient of a state that was passed as
        `state=` is in the result; a graph behind it did not outlive the process.

        Raises:
            InputError: nothing was saved there, it is damaged, or something differs: with what does.
            ConsumedError: inputs that were read before have other values now.
        """
        document, saved = read_document(Path(folder), device_of(require_causal_model(model)))
        state = None
        if document["state"] is not None:
            spec, leaves = document["state"]
            state = tree.unflatten([unpacked_value(leaf) for leaf in leaves], tree.loads(spec))
        segment = cls(
            model,
            inputs,
            targets,
            context=context,
            chunk=document["chunk"],
            schedule=schedule_from_dict(document["schedule"]),
            loss_fn=loss_fn,
            state=state,
            on_chunk=on_chunk,
            sink=sink,
            final_state=document.get("to end", True),
        )
        segment._require_savable_sinks()
        segment._identity = identity_of(segment._call, segment._loss_fn) | segment._called_with.settings(model)
        differing = differences(document["identity"], segment._identity)
        if differing:
            raise InputError(
                f"{folder}: this segment was saved with something else: {'; '.join(differing)}. Expected the same: the "
                "gradient would belong to neither, or end with other bits"
            )
        segment._go_on_from(document, saved)
        plan = segment._started.run.progress.plan
        segment._call.plan = None if plan is None else Plan.from_dict(plan)
        return segment

    def _go_on_from(self, document: dict[str, Any], saved: SavedRows) -> None:
        self._loss_grad, self._saved = document["loss_grad"], saved
        self._call.sequences[0].seed = document["progress"]["seed"]
        self._started = self._call.start(0, to_end=self._to_end)
        progress = self._started.run.progress
        made = [carrier.checksum() for carrier in progress.carriers]
        progress.load_state(document["progress"], {document["device"]: self._call.shared.device})
        for carrier, bits in zip(progress.carriers, fetch(made), strict=True):
            if not progress.witness.agrees(f"state {carrier.name}", 0, bits):
                raise InputError(
                    f"the model makes another initial state than when the segment was saved ({carrier.name}); expected "
                    "initial_state to depend on its weights and torch's generators alone"
                )

    def _require_savable_sinks(self) -> None:
        assert self._call.gather is not None
        self._call.gather.refuse_sinks_without_state()

    def _tell(self, event: Event) -> None:
        if self.on_chunk is not None:
            self.on_chunk(event)
