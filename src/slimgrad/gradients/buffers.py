"""Where parameter gradients gather over the chunks, and how they are delivered once.

Chunks run on stand-ins: parameters that share the model's storage and have a `.grad` of their own. So a
parameter's hooks (clipping, data parallelism) see nothing until the end, when its whole gradient goes through the real
leaf in one piece; an interrupt before that leaves every `.grad` as it was; tied weights have one stand-in.

Gradients are added where they are kept: one buffer per parameter, float32 for 16-bit parameters (adding in bfloat16 is
off by 0.33 after 4,096 chunks). A chunk's gradient of one parameter at a time exists beside them; for the weights of
plain linear layers and embeddings not even that (see `fused`). A parameter with a sink of its own has no buffer.

A stand-in takes gradients from its own sweep alone. Whatever else reaches it (a side loss that a module kept, another
thread's backward pass) would be lost, and is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimgrad.errors import ConsumedError, InputError, ModelError, SweepError
from slimgrad.gradients.escaped import refuse_escaped
from slimgrad.gradients.fused import Fused, add_rows, fused_forward, is_fusable, outside_compiled
from slimgrad.gradients.graph import is_leaf, node_of
from slimgrad.gradients.sink import SavedSink, Sink
from slimgrad.sweep.interrupt import uninterrupted

_TORCH_SAYS = {
    "backward through the graph a second time": (
        "the graph of a chunk reaches into one that was gone through before: the model or loss_fn kept a tensor of "
        "another chunk, or computes with one from outside. Expected a chunk's loss to come from its own inputs, its "
        "state and the parameters. Detach what is kept, or carry it in the state"
    ),
    "use_reentrant=True": (
        "torch.utils.checkpoint(use_reentrant=True) was used within forward; it cannot say which gradients it was "
        "asked for. Use use_reentrant=False"
    ),
}


class _Places(NamedTuple):
    """Where a module holds the parameters, and what follows them."""

    module: nn.Module
    parameters: Sequence[tuple[dict[str, Any], str, Tensor]]  # a submodule's own parameters, the name, the parameter
    recurrent: Sequence[nn.RNNBase]
    fused: Sequence[tuple[nn.Module, Fused, Tensor]]  # a layer, what runs in its place, its weight's stand-in


class Gather:
    """The gradients of one call, parameter by parameter.

    Args:
        parameters: the trainable parameters by name, each once.
        sink: by name, what takes each chunk's gradient of a parameter instead of a buffer; whatever is linear in the
            gradient (a projection, a selection of columns) stays exact. Nothing is then delivered for it. The tensor is
            the sink's to keep.
    """

    def __init__(self, parameters: Mapping[str, Tensor], sink: Mapping[str, Sink] | None = None) -> None:
        self._parameters = dict(parameters)
        self._sinks = dict(sink or {})
        self._wide: dict[str, Tensor] = {}
        self._places: _Places | None = None
        self._thread: int | None = None  # which thread runs a chunk on the stand-ins
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # on which a chunk runs
        self._graph_task: int | None = None  # autograd's number of the chunk's own backward pass
        self._stand_ins: dict[int, Tensor] = {}
        self.edges: list[GradientEdge] = []
        self._shares: list[Tensor] = []  # those whose gradient may yet share its memory with another's
        self._storages: set[int] = set()
        self._backwards = 0  # chunks whose gradients are all here
        self._touched = False  # whether a gradient of the chunk under way may be among them
        for name, parameter in self._parameters.items():
            stand_in = self._stand_ins[id(parameter)] = self.leaf_for(parameter)
            if name in self._sinks or stand_in.dtype in (torch.bfloat16, torch.float16):
                stand_in.register_post_accumulate_grad_hook(self._hook(name))

    def leaf_for(self, x: Tensor) -> Tensor:
        """A stand-in for `x`, a parameter or a part of the context: what the gradients of all chunks gather in."""
        leaf = x.detach()
        if type(leaf) is Tensor:  # models look at class and attributes
            leaf = Tensor._make_subclass(type(x), leaf)  # pyright: ignore[reportPrivateUsage]
            leaf.__dict__ = x.__dict__  # pyright: ignore[reportAttributeAccessIssue]
        leaf.requires_grad_().register_hook(_only_inside(weakref.ref(self)))  # no cycle, so buffers go with the call
        self.edges.append(get_gradient_edge(leaf))
        self._shares.append(leaf)
        return leaf

    @property
    def stand_ins(self) -> list[Tensor]:
        """In the order of the parameters."""
        return list(self._stand_ins.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        gradients = [x.grad for x in self._stand_ins.values()]
        return sum(g.nbytes for g in gradients if g is not None) + sum(g.nbytes for g in self._wide.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing has gathered yet."""
        return not self._wide and all(x.grad is None for x in self._stand_ins.values())

    def forget(self) -> bool:
        """Drop the part of a chunk's gradients that a failed backward pass left.

        Returns:
            False where other chunks' gradients are in the same buffers, or some went to a sink.
        """
        if not self._touched:
            return True
        if self._backwards or self._sinks:
            return False
        self._wide.clear()
        for edge in self.edges:
            edge.node.variable.grad = None  # pyright: ignore
        return True

    def touch(self) -> None:
        """A gradient of the chunk under way is about to be added."""
        self._touched = True

    def state(self) -> dict[str, Any]:
        """What has gathered, and the sinks' own."""
        leaves = [edge.node.variable.grad for edge in self.edges]  # pyright: ignore
        sinks = {name: sink.state() for name, sink in self._sinks.items() if isinstance(sink, SavedSink)}
        return {"leaves": leaves, "wide": dict(self._wide), "backwards": self._backwards, "sinks": sinks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for edge, gradient in zip(self.edges, state["leaves"], strict=True):
            edge.node.variable.grad = gradient  # pyright: ignore
        self._wide, self._backwards = dict(state["wide"]), state["backwards"]
        for name, saved in state["sinks"].items():
            cast(SavedSink, self._sinks[name]).load(saved)

    @property
    def sinks(self) -> list[str]:
        """The names of the parameters that have one."""
        return sorted(self._sinks)

    def refuse_sinks_without_state(self) -> None:
        """Raise where a sink could not be saved."""
        for name, sink in self._sinks.items():
            if not isinstance(sink, SavedSink):
                raise InputError(
                    f"the sink of {name} cannot be saved: expected an object with state() and load(state), got "
                    f"{type(sink).__name__}. See slimgrad.SavedSink"
                )

    def refuse_hooks(self) -> None:
        """Raise if the model registered a hook on one of its parameters while a chunk ran."""
        for name, parameter in self._parameters.items():
            hooks = self._stand_ins[id(parameter)]._backward_hooks
            if hooks is not None and len(hooks) > 1:
                raise SweepError(
                    f"a hook was registered on parameter {name} within forward; it would run once for every chunk, and "
                    "on a part of the gradient. Register it outside, once: it then gets the whole gradient"
                )

    def name_of(self, x: Tensor) -> str | None:
        """The name of the parameter that `x` is, if it is one."""
        return next((name for name, parameter in self._parameters.items() if parameter is x), None)

    def is_inside(self, device: torch.device) -> bool:
        """Whether a chunk runs on the stand-ins, in this thread (on other devices autograd has its own)."""
        return self._thread is not None and (device.type != "cpu" or self._thread == threading.get_ident())

    def is_on_its_stream(self, device: torch.device) -> bool:
        """Whether the work of now is in the chunk's own stream: autograd does not know what is added beside it."""
        stream = self._streams.get(device)
        return stream is None or torch.cuda.current_stream(device) == stream

    def is_own_backward(self) -> bool:
        """Whether this is the chunk's own backward pass, and not one that the model runs on its way or inside it."""
        return self._graph_task is not None and self._graph_task == torch._C._current_graph_task_id()  # pyright: ignore

    def backward(
        self, tensors: Sequence[Tensor | GradientEdge], cotangents: Sequence[Tensor], leaves: Sequence[GradientEdge]
    ) -> None:
        """Backpropagate from `tensors` into the stand-ins, and into `leaves`."""

        def note(_: Any) -> None:
            self._graph_task = torch._C._current_graph_task_id()  # pyright: ignore

        for x in tensors:
            node = node_of(x)
            if node is not None and not is_leaf(node):
                node.register_prehook(note)
        self._touched = False
        try:
            # Edges, not tensors: a root may be a leaf as well (a state returned untouched)
            torch.autograd.backward(cast(Any, list(tensors)), cotangents, inputs=[*self.edges, *leaves])
        except RuntimeError as error:
            for text, meaning in _TORCH_SAYS.items():
                if text in str(error):
                    raise SweepError(meaning) from error
            raise
        finally:
            self._graph_task = None
        self._backwards += 1
        if self._shares:
            self._shares = [x for x in self._shares if not self._owns(x)]

    def _owns(self, leaf: Tensor) -> bool:
        """Give a new buffer memory of its own.

        Autograd keeps whatever comes first: of `torch.stack([p, q])`, two views of one tensor. Adding to the one in the
        next chunk would add to the other.
        """
        if leaf.grad is None or leaf.grad.layout is not torch.strided:
            return False
        if type(leaf.grad) is not Tensor:  # a sharded one has no memory to look at
            return True
        storage = leaf.grad.untyped_storage()
        if storage.nbytes() != leaf.grad.nbytes or storage.data_ptr() in self._storages:
            leaf.grad = leaf.grad.clone()
            storage = leaf.grad.untyped_storage()
        self._storages.add(storage.data_ptr())
        return True

    def add_product(self, stand_in: Tensor, left: Tensor, right: Tensor) -> None:
        """Add `left @ right` to the gradient of `stand_in`."""
        self._touched = True
        if stand_in.grad is None:
            stand_in.grad = left @ right
        else:
            self._dense(stand_in).addmm_(left, right)

    def add_rows(self, stand_in: Tensor, indices: Tensor, rows: Tensor) -> None:
        """Add `rows` to the rows `indices` of the gradient of `stand_in`."""
        self._touched = True
        if stand_in.grad is None:
            stand_in.grad = torch.zeros_like(stand_in, requires_grad=False)
        add_rows(self._dense(stand_in), indices, rows)

    @staticmethod
    def _dense(stand_in: Tensor) -> Tensor:
        """The buffer; a sparse embedding tied to a dense layer leaves a sparse one."""
        assert stand_in.grad is not None
        if stand_in.grad.layout is not torch.strided:
            stand_in.grad = stand_in.grad.to_dense()
        return stand_in.grad

    def refuse_frozen(self) -> None:
        """Raise where a parameter would not take its gradient any more."""
        frozen = [name for name, p in self._parameters.items() if not p.requires_grad and name not in self._sinks]
        if frozen:
            raise ConsumedError(
                f"a parameter was frozen since the call began ({', '.join(frozen[:3])}), so that nobody would take its "
                "gradient. Expected requires_grad as it was until the gradient is there"
            )

    def take(self) -> dict[str, Tensor | None]:
        """Hand out what has gathered, by parameter name, in the parameter's own dtype; None where nothing came."""
        taken: dict[str, Tensor | None] = {}
        for name, parameter in self._parameters.items():
            stand_in = self._stand_ins[id(parameter)]
            gradient, stand_in.grad = stand_in.grad, None
            taken[name] = self._wide.pop(name).to(parameter.dtype) if name in self._wide else gradient
        return taken

    def deliver(self, extra: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Send each gathered gradient through its real leaf, once: `.grad` grows and the leaf's hooks run.

        Where `.grad` is None, the buffer itself becomes it. A keyboard interrupt waits until all are delivered, so that
        `.grad` holds either nothing of this call or all.

        Args:
            extra: further (tensor, gradient) pairs, delivered likewise: inputs, context, states.
        """
        self.refuse_frozen()
        with uninterrupted(second_passes=False), torch.enable_grad():
            if extra:  # together: they may share a graph, which can be gone through only once, and first: that may fail
                torch.autograd.backward([tensor for tensor, _ in extra], [gradient for _, gradient in extra])
            taken = self.take()
            for name, parameter in self._parameters.items():
                gradient = [g] if (g := taken.pop(name)) is not None else []
                del g
                if gradient:
                    torch.autograd.backward([cast(Tensor, _HandOver.apply(parameter, gradient))])

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Generator[None]:
        """Within the block, `module` and all below it use the stand-ins in place of their parameters."""
        places = self._find_places(module)
        gone = [name for own, name, parameter in places.parameters if own.get(name) is not parameter]
        if gone:
            raise ConsumedError(
                f"a parameter of the model was replaced by another since the call began ({', '.join(gone)}); expected "
                "the same ones until its backward is done"
            )
        self._thread = threading.get_ident()
        devices = {x.device for x in self._stand_ins.values() if x.device.type == "cuda"}
        self._streams = {device: torch.cuda.current_stream(device) for device in devices}
        try:
            for own, name, parameter in places.parameters:
                own[name] = self._stand_ins[id(parameter)]
            for rnn in places.recurrent:
                _refresh_flat_weights(rnn)
            for layer, forward, stand_in in places.fused:
                forward.tie(self, stand_in)
                layer.__dict__["forward"] = forward
            yield
            self._refuse_replaced(places)
        finally:
            for layer, forward, _ in places.fused:
                forward.tie(None, None)
                layer.__dict__.pop("forward", None)
            for own, name, parameter in places.parameters:
                own[name] = parameter
            for rnn in places.recurrent:
                _refresh_flat_weights(rnn)
            self._thread = None

    def _refuse_replaced(self, places: _Places) -> None:
        """Raise if the model put another tensor, or another memory, in place of one of its parameters."""
        for own, name, parameter in places.parameters:
            stand_in = self._stand_ins[id(parameter)]
            same = own.get(name) is stand_in
            if not same or (type(parameter) is nn.Parameter and stand_in.data_ptr() != parameter.data_ptr()):
                raise ModelError(
                    f"parameters were written to while a chunk ran: {name} was replaced. The chunks before and after "
                    "would use other weights, and the gradient would belong to neither. Change weights between calls"
                )

    def _find_places(self, module: nn.Module) -> _Places:
        """Looked up once, entered once per chunk."""
        if self._places is None or self._places.module is not module:
            parameters = [
                (cast("dict[str, Any]", submodule._parameters), name, parameter)  # pyright: ignore[reportPrivateUsage]
                for submodule in module.modules()
                for name, parameter in submodule._parameters.items()  # pyright: ignore[reportPrivateUsage]
                if parameter is not None and id(parameter) in self._stand_ins
            ]
            recurrent = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
            fused = [
                (layer, fused_forward(layer), stand_in)
                for layer in dict.fromkeys(outside_compiled(module))
                if is_fusable(layer) and (stand_in := self._fusable(layer)) is not None
            ]
            self._places = _Places(module, parameters, recurrent, fused)
        return self._places

    def _fusable(self, layer: nn.Module) -> Tensor | None:
        """The stand-in of the layer's weight, if products may be added into its buffer."""
        stand_in = self._stand_ins.get(id(layer._parameters["weight"]))  # pyright: ignore[reportPrivateUsage]
        return stand_in if stand_in is not None and self.adds_in_place(stand_in) else None

    def adds_in_place(self, stand_in: Tensor) -> bool:
        """Whether the buffer has the parameter's own dtype, and no sink is wanted instead."""
        hooks = stand_in._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
        return not hooks and stand_in.dtype in (torch.float32, torch.float64)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        """Takes each chunk's gradient off a stand-in that has a sink, or a wider buffer."""
        owner = weakref.ref(self)

        def take(stand_in: Tensor) -> None:
            gradient, stand_in.grad = stand_in.grad, None
            gather = owner()
            assert gather is not None
            assert gradient is not None
            if name in gather._sinks:
                gather._sinks[name](gradient.clone())  # the sink's to keep: autograd may have given others a view
            elif name in gather._wide:
                gather._wide[name] += gradient
            else:
                gather._wide[name] = gradient.float()

        return take


class _HandOver(torch.autograd.Function):
    """Gives a leaf its gradient while nobody else holds it, so that autograd keeps it and copies nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, parameter: Tensor, gradient: list[Tensor]) -> Tensor:
        cast(Any, ctx).gradient = gradient
        return torch.zeros(())

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return cast("list[Tensor]", cast(Any, ctx).gradient).pop(), None


def _only_inside(owner: weakref.ref[Gather]) -> Callable[[Tensor | None], None]:
    def guard(gradient: Tensor | None) -> None:
        gather = owner()
        if gradient is not None and (gather is None or not gather.is_inside(gradient.device)):
            refuse_escaped(gradient)
        if gather is not None:
            gather.touch()

    return guard


def _refresh_flat_weights(rnn: nn.RNNBase) -> None:
    """torch's recurrent layers hold their parameters in a second list, which must follow the swap."""
    module = cast(Any, rnn)
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]
