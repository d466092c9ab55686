"""What real models and callers do outside of the rules, kind by kind: each is delivered right, or refused by name.

A check runs slimgrad and compares with plain backpropagation in float64. It raises AssertionError where a number comes
out that is wrong, or where the refusal does not say what it should.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import slimgrad as sg
from tests.contract.contract import explicit, spans, worst_error

TOLERANCE = 1e-12  # measured over all checks: at most 2e-15
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 11
CHUNK = 9
Grads = dict[str, Tensor]


class Net(nn.Module):
    """A recurrence with a long memory; `roll` is the part that the kinds below change something around."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(vocabulary, width),
            nn.Linear(width, width),
            nn.Linear(width, vocabulary),
        )
        self.double()

    def initial_state(self, batch_size: int) -> Any:
        return self.head.weight.new_zeros(batch_size, self.head.in_features)

    def roll(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        steps = []
        for t in range(x.shape[1]):
            h = 0.9 * h + torch.tanh(self.mix(h) + x[:, t])
            steps.append(h)
        return torch.stack(steps, 1), h

    def forward(self, tokens: Tensor, h: Any) -> tuple[Any, Any]:
        y, h = self.roll(self.embed(tokens), h)
        return self.head(y), h


def built(model_type: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return model_type()


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten().long(), ignore_index=-100, reduction="sum")


def grads(model: nn.Module) -> Grads:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain_loss(
    model: nn.Module, targets: Tensor | None = None, *, loss_fn: Any = total, state: Any = None,
    chunk: int | None = None, inputs: Any = None,
) -> Tensor:  # fmt: skip
    """Plain PyTorch: one graph over the whole sequence, in one call or cut as slimgrad cuts it."""
    inputs = TOKENS if inputs is None else inputs  # found now: the tests of CUDA put others there
    targets = explicit(inputs, targets)
    state = model.initial_state(len(targets)) if state is None else state
    losses, time = [], targets.shape[1]
    for start, stop in spans(time, chunk or time):
        outputs, state = model(inputs[:, start:stop], state)
        losses.append(loss_fn(outputs, targets[:, start:stop]))
    return torch.stack(losses).sum() / int((targets.long() != -100).sum())


def plain_grads(model: nn.Module, *args: Any, **options: Any) -> Grads:
    plain_loss(model, *args, **options).backward()
    return grads(model)


def require_exact(got: Grads, expected: Grads) -> None:
    error, name = worst_error(got, expected)
    assert error <= TOLERANCE, f"{name} is off by {error:.1e}"


def refused(message: str, call: Callable[[], Any]) -> bool:
    """Whether `call` was refused with this message; any other refusal is a failure."""
    try:
        call()
    except sg.SlimgradError as error:
        said = str(error)
    else:
        return False
    assert re.search(message, said), f"refused, but: {said}"
    return True


def right_or_refused(message: str, model: nn.Module, expected: Grads, call: Callable[[], Any]) -> None:
    if not refused(message, call):
        require_exact(grads(model), expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def both_ways(message: str | None, model: nn.Module, expected: Grads, *args: Any, **options: Any) -> None:
    """`backward` and `loss`, right (or, with a message, refused)."""
    options = {"chunk": CHUNK} | options
    for way in (
        lambda: sg.backward(model, TOKENS, *args, **options),
        lambda: sg.loss(model, TOKENS, *args, **options).backward(),
    ):
        if message is None:
            way()
            require_exact(grads(model), expected)
        else:
            right_or_refused(message, model, expected, way)


# --- targets and losses ---


def unsigned_targets() -> None:
    """-100 wraps to 156 in uint8 and to 65,436 in uint16, which are tokens there."""
    for dtype, wrapped in ((torch.uint8, 156), (torch.uint16, 65_436)):
        model = built(partial(Net, 11 if dtype == torch.uint16 else 256))
        targets = (TOKENS * 3).to(torch.int64)
        targets[0, ::4] = wrapped if dtype == torch.uint8 else 0
        loss_fn = lambda outputs, targets: total(outputs, targets.long() % outputs.shape[-1])  # noqa: E731
        expected = plain_grads(model, targets, loss_fn=loss_fn)
        both_ways(None, model, expected, targets.to(dtype), loss_fn=loss_fn)


def a_mean_over_the_chunk() -> None:
    model = built(Net)
    mean = lambda outputs, targets: F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-100)  # noqa: E731
    mean(model(TOKENS, model.initial_state(2))[0], explicit(TOKENS, None)).backward()
    both_ways("returned the mean over its chunk; expected the sum", model, grads(model), loss_fn=mean)


def a_foreign_tensor(where: str) -> None:
    """A tensor that requires gradients, from outside, used in one chunk alone or in the initial state."""
    outside = torch.ones(8, dtype=torch.float64, requires_grad=True)

    class Foreign(Net):
        def initial_state(self, batch_size: int) -> Tensor:
            h = super().initial_state(batch_size)
            return h + outside if where == "initial state" else h

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            start = int(tokens[0, 0]) == int(TOKENS[0, 2 * CHUNK])
            outputs, h = super().forward(tokens, h)
            return outputs, h * outside if start and where == "state" else h

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        inside = torch.equal(targets, TOKENS[:, CHUNK + 1 : 2 * CHUNK + 1])
        return total(outputs, targets) * (outside.sum() / 8 if inside and where == "loss" else 1)

    for way in (
        lambda model: sg.backward(model, TOKENS, chunk=CHUNK, loss_fn=loss_fn),
        lambda model: sg.loss(model, TOKENS, chunk=CHUNK, loss_fn=loss_fn).backward(),
    ):
        model = built(Foreign)
        message = "the initial state" if where == "initial state" else r"tokens \d+ to \d+"
        if not refused(
            rf"{message}: the loss depends on a tensor of shape \(8,\) that requires gradients", partial(way, model)
        ):
            assert outside.grad is not None, "the gradient of the tensor from outside is lost"
        assert outside.grad is None
        assert all(p.grad is None for p in model.parameters())


def a_parameter_kept_beside() -> None:
    """A dict that holds a parameter, as ncps' LTC has one: while a chunk runs, the module holds a stand-in."""

    class Beside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {"weight": self.mix.weight}

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            outputs, h = super().forward(tokens, h)
            return outputs * (1 + (h @ self.kept["weight"]).mean()), h

    model = built(Beside)
    both_ways("parameter mix.weight was used, but not read from its module", model, plain_grads(model, chunk=CHUNK))


def targets_that_require_gradients() -> None:
    model = built(Net)
    soft = torch.rand(2, 40, 11, dtype=torch.float64, requires_grad=True)
    for call in (sg.backward, sg.loss):
        if not refused("targets require gradients", lambda: call(model, TOKENS, soft, chunk=CHUNK, loss_fn=soft_loss)):  # noqa: B023
            assert soft.grad is not None, "the gradient of the targets is lost"


def soft_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs.log_softmax(-1) * targets).sum()


def a_given_state_with_a_graph() -> None:
    model, encoder = built(Net), nn.Linear(5, 8).double()
    image = torch.randn(2, 5, dtype=torch.float64)
    expected = plain_grads(model, state=torch.tanh(encoder(image)))
    outside = grads(encoder)
    sg.backward(model, TOKENS, chunk=CHUNK, state=torch.tanh(encoder(image)))
    require_exact(grads(model) | grads(encoder), expected | outside)


def counts_within_the_chunk() -> None:
    """`scale_grad_by_freq` divides by how often a token occurs, in the chunk or in the sequence."""

    class Counted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8, scale_grad_by_freq=True, dtype=torch.float64)

    class ByHand(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            y, h = self.roll(F.embedding(tokens, self.embed.weight, scale_grad_by_freq=True), h)
            return self.head(y), h

    for model_type in (Counted, ByHand):
        model = built(model_type)
        both_ways("scale_grad_by_freq divides a token's gradient", model, plain_grads(model))


# --- what changes between the two sweeps ---


class Scaled(Net):
    """Its outputs depend on an attribute, and on its mode."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.table = [1.0]

    def forward(self, tokens: Tensor, h: Tensor) -> Any:
        outputs, h = super().forward(tokens, h)
        return outputs * self.scale * self.table[0] * (1.5 if self.training else 1.0), h


def changed_between(change: Callable[[Any], None], message: str = "$^") -> None:
    """What a loss was computed with counts, whatever changes before its backward: it is put back, or refused."""
    for call in (
        sg.loss,
        lambda *args, **options: sg.token_loss(*args, **options).sum() / 78,
        lambda *args, **options: total(sg.outputs(*args, **options), explicit(TOKENS, None)) / 78,
    ):
        model = built(Scaled)
        expected = plain_grads(model)
        loss = call(model, TOKENS, chunk=CHUNK)
        before = copy.deepcopy({k: v for k, v in vars(model).items() if k in ("training", "scale")})
        change(model)
        now = {k: v for k, v in vars(model).items() if k in before}
        if not refused(message, loss.backward):
            require_exact(grads(model), expected)
        assert {k: v for k, v in vars(model).items() if k in before} == now  # the caller's settings are left alone


def a_mode_changed_between() -> None:
    changed_between(lambda model: model.eval())


def an_attribute_changed_between() -> None:
    changed_between(lambda model: setattr(model, "scale", 2.0))


def a_list_changed_between() -> None:
    changed_between(lambda model: model.table.__setitem__(0, 2.0), "came out differently in the reverse sweep")


def a_weight_changed_unseen() -> None:
    changed_between(lambda model: model.head.weight.data.mul_(1.1), "came out differently in the reverse sweep")


def a_frozen_weight_thawed_between() -> None:
    model = built(Net)
    model.mix.weight.requires_grad_(False)
    expected = plain_grads(model)
    loss = sg.loss(model, TOKENS, chunk=CHUNK)
    model.mix.weight.requires_grad_(True)
    loss.backward()
    assert model.mix.weight.requires_grad
    require_exact(grads(model), expected)


# --- what a model keeps beside its state ---


def state_in_an_attribute(how: str) -> None:
    class Kept(Net):
        def initial_state(self, batch_size: int) -> Any:
            self.count, self.notes, self.h = 0, {"n": 0}, super().initial_state(batch_size)
            return {"h": super().initial_state(batch_size)}

        def forward(self, tokens: Tensor, state: Any) -> Any:
            n = {"number": self.count, "dict": self.notes["n"]}.get(how, 0)
            y, h = self.roll(self.embed(tokens) * (1 + 0.01 * n), state["h"] + (self.h if how == "tensor" else 0))
            self.count += tokens.shape[1]
            self.notes["n"] += tokens.shape[1]
            self.h = h.detach()
            return self.head(y), {"h": h}

    model = built(Kept)
    name = {"number": "count", "dict": "notes", "tensor": "h"}[how]
    message = rf"Kept changed attributes while a chunk ran \([\w, ]*{name}"
    both_ways(message, model, plain_grads(model, chunk=CHUNK))


def attributes_that_nobody_reads() -> None:
    """A counter, a kept activation, a weight made anew by a hook: written in each run, never read, right."""

    class Written(Net):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            outputs, h = super().forward(tokens, h)
            self.calls, self.last = self.calls + 1, outputs
            return outputs, h

    both_ways(None, model := built(Written), plain_grads(model))
    pruned = built(Net)
    prune.l1_unstructured(pruned.mix, "weight", amount=0.3)
    both_ways(None, pruned, plain_grads(pruned))


def state_in_an_object() -> None:
    class Box:
        def __init__(self, h: Tensor) -> None:
            self.h = h

    class Boxed(Net):
        def initial_state(self, batch_size: int) -> Any:
            return Box(super().initial_state(batch_size))

        def forward(self, tokens: Tensor, box: Any) -> Any:
            y, h = self.roll(self.embed(tokens), box.h)
            box.h = h.detach()
            return self.head(y), box

    model = built(Boxed)
    both_ways("is a Box: expected a tensor, a PrefixSum", model, plain_grads(model, chunk=CHUNK))


def a_state_that_begins_as_none() -> None:
    class Cell(Net):
        def initial_state(self, batch_size: int) -> Any:
            return None

        def forward(self, tokens: Tensor, h: Any) -> Any:
            return super().forward(tokens, super().initial_state(len(tokens)) if h is None else h)

    model = built(Cell)
    both_ways(
        r"began as None and came back as a tensor \[2, 8\] in tokens 0 to 8.*Begin with zeros",
        model,
        plain_grads(model),
    )


def a_side_loss() -> None:
    """Kept on the module for the caller to add: its graph ends where its chunk began."""

    class Sided(Net):
        of_weights = False

        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            y, h = self.roll(self.embed(tokens), h)
            self.side.append((self.mix.weight if self.of_weights else self.mix(y)).square().mean())
            return self.head(y), h

    for after in (False, True):
        model = built(Sided)
        model.of_weights = after
        model.side = []
        (plain_loss(model, chunk=CHUNK) + sum(model.side)).backward()
        expected = grads(model)
        model.side = []
        if after:
            sg.backward(model, TOKENS, chunk=CHUNK)
            call = sum(model.side[-5:]).backward
        else:
            call = (sg.loss(model, TOKENS, chunk=CHUNK) + sum(model.side[-5:])).backward
        if not refused("reached into a chunk of a sweep from outside", call):
            require_exact(grads(model), expected)


def a_backward_within_forward() -> None:
    class Inner(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            with torch.enable_grad():
                self.mix(self.embed(tokens)).square().sum().backward()
            return super().forward(tokens, h)

    model = built(Inner)
    expected = plain_grads(model, chunk=CHUNK)
    message = r"a \.backward\(\) within forward added gradients|forward changed the \.grad of the model's parameters"
    both_ways(message, model, expected)


def a_parameter_written_on_the_way() -> None:
    class Clipped(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            outputs, h = super().forward(tokens, h)
            with torch.no_grad():
                self.mix.weight.mul_(0.99)
            return outputs, h

    for call in (sg.backward, sg.loss, sg.evaluate):
        written = partial(call, built(Clipped), TOKENS, chunk=CHUNK)
        assert refused("parameters were written to while a chunk ran: mix.weight", written)


# --- how torch is asked to compute ---


def other_weights_by_functional_call() -> None:
    """A fused layer that is called with another weight must not give that weight's gradient away."""

    class Fast(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            fast = {name: 0.5 * p for name, p in self.mix.named_parameters()}
            y, h = self.roll(self.embed(tokens), h)
            return self.head(torch.func.functional_call(self.mix, fast, (y,))), h

    both_ways(None, model := built(Fast), plain_grads(model))


def an_own_gradient_within_a_backward() -> None:
    """A function that makes its inside again in the backward pass, and asks for its weights' gradient itself."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, layer: nn.Module, *weights: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.layer, ctx.weights = layer, weights
            return layer(x)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                of_x, *_ = torch.autograd.grad(ctx.layer(x), (x, *ctx.weights), g)
                return of_x, None, *torch.autograd.grad(ctx.layer(x), ctx.weights, g)

    class Remade(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            y, h = self.roll(self.embed(tokens), h)
            return self.head(Again.apply(y, self.mix, self.mix.weight, self.mix.bias)), h

    both_ways(None, model := built(Remade), plain_grads(model))


def backward_within_autocast() -> None:
    """The backward pass runs outside of autocast: a float32 island stays one, wherever backward is called."""

    class Island(Net):
        def forward(self, tokens: Tensor, h: Tensor) -> Any:
            with torch.autocast("cpu", enabled=False):
                return super().forward(tokens, h)

    model = built(Island)
    expected = plain_grads(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sg.backward(model, TOKENS, chunk=CHUNK)
        require_exact(grads(model), expected)
        loss = sg.loss(model, TOKENS, chunk=CHUNK)
        loss.backward()
        require_exact(grads(model), expected)


# --- threads ---


class Noisy(Net):
    def forward(self, tokens: Tensor, h: Tensor) -> Any:
        y, h = self.roll(self.embed(tokens), h)
        return self.head(F.dropout(y, 0.5)), h


def two_models_that_draw() -> None:
    """PyTorch has one generator a process: sweeps on different models take turns, chunk by chunk."""
    errors: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(15):
                sg.loss(model, TOKENS, chunk=3).backward()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(built(Noisy),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def a_second_sweep_on_a_model() -> None:
    """Refused while a sweep is under way on it in another thread; between a loss and its backward it is free."""
    model, said = built(Net), []

    def second() -> None:
        try:
            sg.backward(model, TOKENS, chunk=CHUNK)
        except sg.SweepError as error:
            said.append(str(error))

    def meanwhile(event: sg.Event) -> None:
        if event.phase == "reverse" and event.start == 2 * CHUNK:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    expected = plain_grads(model)
    sg.backward(model, TOKENS, chunk=CHUNK, on_chunk=meanwhile)
    require_exact(grads(model), expected)
    assert [s for s in said if "a sweep is under way in another thread on this Net" in s], said
    (sg.loss(model, TOKENS, chunk=CHUNK) + sg.loss(model, TOKENS, chunk=7)).backward()
    require_exact({name: g / 2 for name, g in grads(model).items()}, expected)


def a_plain_backward_beside_a_sweep() -> None:
    """Another thread's own forward, while a chunk runs, would meet the stand-ins."""
    model, said = built(Net), []

    def beside() -> None:
        try:
            plain_loss(model).backward()
        except sg.SweepError as error:
            said.append(str(error))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(said) < 2:  # the chunk runs: its stand-ins are in place
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
        return total(outputs, targets)

    expected = plain_grads(model)
    sg.backward(model, TOKENS, chunk=CHUNK, loss_fn=loss_fn)
    require_exact(grads(model), expected)
    assert all("Net was called in another thread while a sweep is under way on it" in s for s in said)
    assert len(said) == 2


# --- what is returned ---


def a_final_state_is_a_copy() -> None:
    class Window(Net):
        def initial_state(self, batch_size: int) -> Any:
            return torch.zeros(batch_size, 3, dtype=torch.int64)

        def forward(self, tokens: Tensor, window: Tensor) -> Any:
            return self.head(self.embed(tokens)), tokens[:, -3:]

    class Constant(Net):
        def initial_state(self, batch_size: int) -> Any:
            return self.head.bias

        def forward(self, tokens: Tensor, bias: Tensor) -> Any:
            return self.head(self.embed(tokens)), self.head.bias

    for call in (sg.evaluate, sg.backward):
        given = TOKENS.clone()
        final = call(built(Window), given, chunk=CHUNK).final_state
        given.zero_()
        assert torch.equal(final, TOKENS[:, -3:])
        model = built(Constant)
        final = call(model, TOKENS, chunk=CHUNK).final_state
        with torch.no_grad():
            before = model.head.bias.clone()
            model.head.bias.add_(1)
        assert torch.equal(final, before)
