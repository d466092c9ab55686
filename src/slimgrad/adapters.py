"""Modules that people have, as causal steps: torch's recurrent layers, its Transformer layer, the blocks of mambapy.

An adapter takes a module that is already made, keeps it as its only child, and adds `initial_state(batch_size)` and
`forward(inputs, state)`. Parameters stay the module's own, so optimisers know them as before; in a `state_dict` their
names have the child's in front (`rnn.`, `layer.`, `model.`), so saved weights are loaded into the module itself. Inputs
and outputs are `[batch, time, features]`, whatever layout the module itself prefers. Gradients equal those of the
module run over the whole sequence at once; a setting for which they could not is refused by name.

import slimgrad as sg
layer = sg.adapters.Recurrent(nn.LSTM(16, 32, num_layers=2))
outputs, state = layer(inputs, layer.initial_state(len(inputs)))    # inputs: [batch, time, 16]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.errors import InputError
from slimgrad.modes import in_mode
from slimgrad.states.rows import Growing
from slimgrad.sweep.program import is_inside_chunk

__all__ = ["MambaPy", "Recurrent", "TransformerLayer"]


class Recurrent(nn.Module):
    """`torch.nn.LSTM`, `GRU` or `RNN`, of any number of layers: its state is what torch calls `hx`.

    The state is `[layers, batch, hidden]`, for an LSTM a pair of them, and begins as zeros. Dropout between layers is
    drawn anew for each chunk, and the same in both sweeps; on CUDA cuDNN draws it where no seed reaches, and it is
    refused there.

    Args:
        rnn: the layer; its `batch_first` is respected inside, and inputs are `[batch, time, features]` either way.

    Raises:
        InputError: another module, or a bidirectional one. When it runs: dropout that cuDNN would draw.

    Cost: the layer's own. A state of `layers * batch * hidden` numbers (twice for an LSTM) per chunk that is kept.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        if not isinstance(rnn, nn.LSTM | nn.GRU | nn.RNN):
            raise InputError(
                f"Recurrent: expected torch.nn.LSTM, GRU or RNN, got {type(rnn).__name__}. A cell of one step goes "
                "into a loop over the chunk in a forward of your own"
            )
        if rnn.bidirectional:
            raise InputError(
                "Recurrent: bidirectional=True is not causal: the second direction reads from the sequence's end, so "
                "that every output depends on later inputs, and no chunk can be run before them. Expected "
                "bidirectional=False. Run what must see both ways before, and pass its outputs as inputs"
            )
        self.rnn = rnn

    def initial_state(self, batch_size: int) -> Any:
        """Zeros, as torch begins: `[layers, batch, proj_size or hidden_size]`; beside it an LSTM's cells."""
        rnn, weight = self.rnn, cast(Tensor, self.rnn.weight_hh_l0)
        hidden = weight.new_zeros(rnn.num_layers, batch_size, rnn.proj_size or rnn.hidden_size)
        cells = weight.new_zeros(rnn.num_layers, batch_size, rnn.hidden_size)
        return (hidden, cells) if isinstance(rnn, nn.LSTM) else hidden

    def forward(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One chunk: `[batch, time, input_size]` -> `[batch, time, proj_size or hidden_size]`, and the next state."""
        if inputs.is_cuda and self.rnn.training:
            _refuse_draws_of_cudnn(self.rnn)
        if self.rnn.batch_first:
            return self.rnn(inputs, state)
        outputs, following = self.rnn(inputs.transpose(0, 1), state)
        return outputs.transpose(0, 1), following


def _refuse_draws_of_cudnn(rnn: nn.RNNBase) -> None:
    replayed = is_inside_chunk() and torch.is_grad_enabled()
    if replayed and rnn.dropout and rnn.num_layers > 1 and torch.backends.cudnn.enabled:
        raise InputError(
            f"Recurrent: dropout={rnn.dropout} on CUDA: cuDNN draws it from a state of its own, which no seed brings "
            "back, so that the two sweeps would differ. Expected dropout=0. Put nn.Dropout between layers that are "
            "adapted one by one, or set torch.backends.cudnn.enabled = False"
        )


class TransformerLayer(nn.Module):
    """`torch.nn.TransformerEncoderLayer`, run causally: its state is the cache of its keys and values.

    Equals `layer(inputs, src_mask=causal, is_causal=True)` over the whole sequence, for either `norm_first`, any
    activation and either `batch_first`. The layer knows no positions: what adds them counts from `state.length`. Hooks
    on the layer as a whole and on its attention, which are not called, are refused; set later they do not run.

    Args:
        layer: a layer; of an `nn.TransformerEncoder` wrap each of `layers`.

    Raises:
        InputError: another module; `add_bias_kv`, `add_zero_attn`, `kdim` or `vdim` in its attention; hooks there; a
            layer that computes something else, because a part of it was replaced.

    Cost: attention's own, quadratic in the length. The cache and its gradient are `2 * d_model` numbers per token each;
    a chunk holds a mask `[chunk, tokens so far]`, and as many scores per head.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        _refuse_attention(layer)
        self.layer = layer
        _require_same(self, lambda x: _causal(layer, x), layer.self_attn.embed_dim)

    def initial_state(self, batch_size: int) -> Growing:
        """No rows yet: `[batch, 0, 2 * d_model]`, a key and a value side by side."""
        attention = self.layer.self_attn
        return Growing(cast(Tensor, attention.in_proj_weight).new_zeros(batch_size, 0, 2 * attention.embed_dim))

    def forward(self, inputs: Tensor, state: Growing) -> tuple[Tensor, Growing]:
        """One chunk: `[batch, time, d_model]` -> the same shape, and the cache with this chunk's rows."""
        layer = self.layer
        mixed, following = self._attend(layer.norm1(inputs) if layer.norm_first else inputs, state)
        x = inputs + layer.dropout1(mixed)
        x = x if layer.norm_first else layer.norm1(x)
        y = layer.linear1(layer.norm2(x) if layer.norm_first else x)
        x = x + layer.dropout2(layer.linear2(layer.dropout(layer.activation(y))))
        return x if layer.norm_first else layer.norm2(x), following

    def _attend(self, x: Tensor, state: Growing) -> tuple[Tensor, Growing]:
        attention, time = self.layer.self_attn, x.shape[1]
        projected = F.linear(x, cast(Tensor, attention.in_proj_weight), attention.in_proj_bias)
        queries, new_rows = projected.split([x.shape[-1], 2 * x.shape[-1]], -1)
        rows, following = state.append(new_rows)
        q, k, v = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (queries, *rows.chunk(2, -1)))
        seen = torch.ones(time, rows.shape[1], dtype=torch.bool, device=x.device).tril(rows.shape[1] - time)
        dropout = attention.dropout if attention.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout).transpose(1, 2).flatten(2)
        return F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias), following


def _causal(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """The layer as torch runs it over a whole sequence `[batch, time, d_model]`."""
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
    if layer.self_attn.batch_first:
        return layer(x, src_mask=mask, is_causal=True)
    return layer(x.transpose(0, 1), src_mask=mask, is_causal=True).transpose(0, 1)


def _refuse_attention(layer: object) -> None:
    if not isinstance(layer, nn.TransformerEncoderLayer):
        raise InputError(
            f"TransformerLayer: expected torch.nn.TransformerEncoderLayer, got {type(layer).__name__}. Of an encoder "
            "wrap each of its layers; what attends to a second sequence takes that as context, in a forward of your own"
        )
    attention = cast(object, layer.self_attn)
    if not isinstance(attention, nn.MultiheadAttention):
        raise InputError(
            f"TransformerLayer: expected torch.nn.MultiheadAttention in self_attn, got {type(attention).__name__}. "
            "Write its step over a Growing in a forward of your own"
        )
    own = nn.TransformerEncoderLayer
    parts = ("forward", "_sa_block", "_ff_block")
    replaced = [name for name in parts if getattr(getattr(layer, name), "__func__", None) is not getattr(own, name)]
    if replaced:
        raise InputError(
            f"TransformerLayer: {type(layer).__name__} has its own {', '.join(replaced)}, which the adapter does not "
            "call: what it does would be left out, in training mode perhaps alone. Expected torch's; or write its step "
            "over a Growing in a forward of your own"
        )
    _refuse_hooks("TransformerLayer", layer, attention)
    width = attention.embed_dim
    settings = {
        "add_bias_kv=True": attention.bias_k is not None,
        "add_zero_attn=True": attention.add_zero_attn,
        f"kdim={attention.kdim}": attention.kdim != width,
        f"vdim={attention.vdim}": attention.vdim != width,
    }
    found = [name for name, is_set in settings.items() if is_set]
    if found:
        raise InputError(
            f"TransformerLayer: {', '.join(found)} in self_attn: the cache holds keys and values of the sequence "
            "alone, made by one projection. Expected torch's default; or write the step over a Growing in a forward of "
            "your own"
        )


class MambaPy(nn.Module):
    """`Mamba` or `MambaBlock` of the package mambapy: its state is each block's recurrence and its convolution's tail.

    mambapy gives a whole sequence without a state, and a `step` of one token with one. This is the form between them:
    the block's own parallel scan over the chunk begins at zero, and what the state before still contributes, which has
    decayed by `exp(A * (delta_1 + ... + delta_t))`, is added. The package is not imported: the attributes of its
    version 1.2.0 are what counts, and a model that computes something else is refused.

    Args:
        model: a `mambapy.mamba.Mamba` (of an `LM` take what lies between embedding and head), or one `MambaBlock`.

    Raises:
        InputError: attributes are missing; `use_cuda=True`; hooks on blocks, layers or the model; a model that computes
            something else.

    Cost: beside mambapy's own, three tensors `[batch, chunk, d_inner, d_state]`. A state of `batch * d_inner *
    (d_state + d_conv - 1)` numbers for each block. `A_log` and `D` are rounded to float32 on the way, as by mambapy.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for block, _ in _blocks(model):
            _refuse_block(block)
        _refuse_hooks("MambaPy", model, *getattr(model, "layers", ()), *(block for block, _ in _blocks(model)))
        width = _blocks(model)[0][0].in_proj.in_features
        _require_same(self, lambda x: _first(model(x)), width)

    def initial_state(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """For each block zeros: `[batch, d_conv - 1, d_inner]`, `[batch, d_inner, d_state]`."""
        found = [(block.in_proj.weight.new_zeros, block.config) for block, _ in _blocks(self.model)]
        return [(z(batch_size, c.d_conv - 1, c.d_inner), z(batch_size, c.d_inner, c.d_state)) for z, c in found]

    def forward(self, inputs: Tensor, state: Iterable[Any]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One chunk: `[batch, time, d_model]` -> the same shape, and each block's next state."""
        x, states = inputs, list[tuple[Tensor, Tensor]]()
        for (block, norm), before in zip(_blocks(self.model), state, strict=True):
            y, following = _selective_scan(block, x if norm is None else norm(x), *before)
            x = y if norm is None else x + y
            states.append(following)
        return x, states


def _selective_scan(block: Any, u: Tensor, tail: Tensor, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One block on one chunk, from the last rows before its convolution and the state of its recurrence."""
    c = block.config
    x, z = block.in_proj(u).chunk(2, -1)
    rows = torch.cat([tail, x], 1)
    x = F.silu(block.conv1d(rows.transpose(1, 2))[..., tail.shape[1] : rows.shape[1]].transpose(1, 2))
    delta, B, C = block._apply_layernorms(*block.x_proj(x).split([c.dt_rank, c.d_state, c.d_state], -1))
    delta = F.softplus(F.linear(delta, block.dt_proj.weight, block.dt_proj.bias))
    A, D = -block.A_log.float().exp(), block.D.float()
    scan = block.selective_scan if c.pscan else block.selective_scan_seq
    before = (A * delta.cumsum(1)[..., None]).exp() * h[:, None]  # what is left of h at each step
    y = _first(scan(x, delta, A, B, C, D)) + (before @ C[..., None])[..., 0]
    to_come = F.pad(delta[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # added up from the end: small ones exactly
    written = (A * to_come[..., None]).exp() * (delta * x)[..., None] * B[:, :, None]
    return block.out_proj(y * F.silu(z)), (rows[:, u.shape[1] :], before[:, -1] + written.sum(1))


def _blocks(model: Any) -> list[tuple[Any, Any]]:
    """Each block, and the norm before it; None for a block alone, which has no residual stream."""
    if not hasattr(model, "layers"):
        return [(model, None)]
    return [(getattr(layer, "mixer", layer), getattr(layer, "norm", None)) for layer in model.layers]


def _first(returned: Any) -> Tensor:
    """Outputs, which later versions of mambapy return beside a state."""
    return cast(Tensor, returned[0] if isinstance(returned, tuple) else returned)


_OF_A_BLOCK = (
    "config", "in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj",
    "_apply_layernorms", "selective_scan", "selective_scan_seq",
)  # fmt: skip


def _refuse_block(block: Any) -> None:
    missing = [name for name in _OF_A_BLOCK if not hasattr(block, name)]
    if missing:
        raise InputError(
            f"MambaPy: {type(block).__name__} has no {', '.join(missing)}; expected mambapy.mamba.Mamba or MambaBlock. "
            "For another model look for the form that takes a chunk and a state, and try it with slimgrad.verify_step"
        )
    if block.config.use_cuda:
        raise InputError(
            "MambaPy: use_cuda=True runs a fused kernel that takes no state. Expected MambaConfig(use_cuda=False), "
            "which runs on CUDA as well"
        )


def _refuse_hooks(adapter: str, *modules: Any) -> None:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(
                f"{adapter}: {type(module).__name__} has hooks, and the adapter does not call it: they would not run. "
                "Expected none there. Register them on the adapter, or on what is below; weights that hooks make anew "
                "(weight_norm) are made by torch.nn.utils.parametrizations as well"
            )


def _require_same(adapter: nn.Module, original: Callable[[Tensor], Tensor], width: int) -> None:
    """Run both on five steps, the adapter in two chunks, without dropout; refuse an original that differs.

    The adapter computes anew what its module computes. What was replaced in the module, or is otherwise in another
    version, would be left out in silence.
    """
    like = next(p for p in adapter.parameters() if p.is_floating_point())
    if like.is_meta:
        return
    # with a graph: torch's fast path for inference goes around what a subclass replaced
    without_autocast = torch.autocast(like.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), without_autocast, in_mode(adapter.modules(), training=False):
        x = torch.arange(2 * 5 * width).sin().view(2, 5, width).to(like).requires_grad_()
        expected = original(x)
        first, state = adapter(x[:, :3], cast(Any, adapter).initial_state(2))
        found = torch.cat([first, adapter(x[:, 3:], state)[0]], 1)
    error, norm = float((found - expected).detach().norm()), float(expected.detach().norm())
    if error > torch.finfo(like.dtype).eps ** (1 / 3) * norm:
        raise InputError(
            f"{type(adapter).__name__}: the module computes something else than its library's (outputs of five steps "
            f"differ by {error:.1e}, of a norm of {norm:.1e}): a part of it was replaced, draws at "
            "random in eval mode, or is of another version. Expected it as it was made; or write its step in a forward "
            "of your own"
        )
