"""`enable(model)`: losses and gradients as without, in float64, however a batch is given; or refused by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

import slimgrad.hf  # noqa: E402
from slimgrad.errors import InputError, ModelError  # noqa: E402
from slimgrad.hf.widen import widened  # noqa: E402
from tests.hf.models import (  # noqa: E402
    KINDS,
    enable,
    gradients,
    large,
    llama,
    mixtral,
    sweeps,
    taken,
    tokens,
    without_dropout,
    worst,
)

EXACT = 1e-10  # measured: 9e-16 to 1e-13 (the hybrid's decay); 5e-12 of RoBERTa's key biases, whose gradient is zero


def both(model: Any, **given: Any) -> float:
    """The error of loss and gradients with `enable` against without."""
    loss, expected = gradients(model, **given)
    enable(model)
    try:
        got_loss, got = gradients(model, **given)
        assert sweeps(model) > 0
    finally:
        slimgrad.hf.disable(model)
    return max(abs(got_loss - loss) / abs(loss), worst(got, expected))


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient(kind: str) -> None:
    model, ids = large(KINDS[kind]()), tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    errors = {"labels": both(model, input_ids=ids, labels=labels)}
    errors["items"] = both(model, input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(31))
    shifted = tokens(seed=2).masked_fill(labels == -100, -100)
    errors["shifted"] = both(model, input_ids=ids, labels=labels, shift_labels=shifted)
    print(kind, errors)
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("kind", ["llama", "window", "mamba2", "hybrid", "mixtral"])
def test_padding_on_the_right_is_each_document_alone(kind: str) -> None:
    model, ids, lengths = large(KINDS[kind]()), tokens(3), (44, 29, 1)
    mask = torch.arange(44) < torch.tensor(lengths)[:, None]
    given = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    error = both(model, **given)
    enable(model)
    loss, got = gradients(model, **given)
    slimgrad.hf.disable(model)
    with widened():
        count = sum(length - 1 for length in lengths)
        parts = [
            model(input_ids=ids[i : i + 1, :n], labels=ids[i : i + 1, :n], num_items_in_batch=count).loss
            for i, n in enumerate(lengths[:2])
        ]
        sum(parts).backward()
    alone = worst(got, taken(model))
    print(kind, "padded", error, "alone", alone)
    assert loss == pytest.approx(sum(parts).item(), rel=1e-12)
    assert max(error, alone) <= EXACT


PACKED = {
    "position_ids": lambda starts, time: {"position_ids": positions(starts, time)},
    "padding-free": lambda starts, time: {
        "position_ids": positions(starts, time),
        "cu_seq_lens_q": torch.tensor([*starts, time], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([*starts, time], dtype=torch.int32),
        "max_length_q": 20,
        "max_length_k": 20,
        "seq_idx": (positions(starts, time) == 0).cumsum(1).int() - 1,
    },
}


def positions(starts: tuple[int, ...], time: int) -> Tensor:
    edges = [*starts, time]
    return torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(edges)])[None]


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("kind", ["llama", "window", "mamba2", "hybrid"])
def test_packed_rows_are_each_document_alone(kind: str, how: str) -> None:
    model, ids, starts = large(KINDS[kind]()), tokens(1, 60), (0, 20, 21, 47, 57, 58, 59)
    labels = ids.clone()
    labels[0, list(starts)] = -100
    enable(model)
    loss, got = gradients(model, input_ids=ids, labels=labels, **PACKED[how](starts, 60))
    assert sweeps(model) == 5  # the last three, of one token each, go together
    slimgrad.hf.disable(model)
    with widened():
        edges, parts = [*starts, 60], []
        for a, b in itertools.pairwise(edges):
            logits = model(input_ids=ids[:, a:b]).logits
            parts.append(F.cross_entropy(logits[0, :-1], ids[0, a + 1 : b], reduction="sum") / (60 - len(starts)))
        sum(parts).backward()
    error = worst(got, taken(model))
    print(kind, how, error)
    assert loss == pytest.approx(sum(parts).item(), rel=1e-12)
    assert error <= EXACT


def test_two_packed_rows() -> None:
    model, ids = large(llama()), tokens(2, 30)
    where = torch.cat([positions((0, 11), 30), positions((0, 17), 30)])
    labels = ids.masked_fill(where == 0, -100)
    enable(model)
    loss, got = gradients(model, input_ids=ids, labels=labels, position_ids=where)
    slimgrad.hf.disable(model)
    parts = [(0, 0, 11), (0, 11, 30), (1, 0, 17), (1, 17, 30)]
    total = 0.0
    for row, a, b in parts:
        one = ids[row : row + 1, a:b]
        with widened():
            part = model(input_ids=one, labels=one, num_items_in_batch=56).loss
            part.backward()
        total += part.item()
    assert loss == pytest.approx(total, rel=1e-12)
    assert worst(got, taken(model)) <= EXACT


@pytest.mark.parametrize("kind", ["llama", "mamba2", "hybrid"])
def test_embeddings_instead_of_tokens(kind: str) -> None:
    model, ids = large(KINDS[kind]()), tokens()
    found = []
    for chunked in (False, True):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        if chunked:
            enable(model)
        loss, grads = gradients(model, inputs_embeds=embeds, labels=ids)
        found.append((loss, {**grads, "embeds": embeds.grad}))
    error = worst(found[1][1], found[0][1])
    print(kind, error)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert error <= EXACT


def test_positions_that_are_given_are_used() -> None:
    """With learned positions, whose rows say where they were looked up."""
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, ids, where = large(transformers.GPT2LMHeadModel(config).eval()), tokens(), torch.arange(7, 51)[None]
    without_dropout(model)
    error = both(model, input_ids=ids, labels=ids, position_ids=where)
    print(error)
    assert error <= EXACT  # measured 4e-15
    assert error <= both(model, input_ids=ids, labels=ids, position_ids=where.expand(2, -1)) + EXACT
    enable(model)
    looked_up = gradients(model, input_ids=ids, labels=ids, position_ids=where)[1]["transformer.wpe.weight"]
    assert looked_up.any(1).nonzero().flatten().tolist() == where[0, :-1].tolist()  # the last predicts nothing


def test_a_routers_auxiliary_loss() -> None:
    model, ids = large(mixtral(output_router_logits=True, router_aux_loss_coef=0.5)), tokens()
    mask = (torch.arange(44) < torch.tensor([44, 29])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    errors = [both(model, input_ids=ids, labels=ids), both(model, input_ids=ids, labels=labels, attention_mask=mask)]
    with_it = gradients(model, input_ids=ids, labels=ids)[1]
    model.config.output_router_logits = False
    without = gradients(model, input_ids=ids, labels=ids)[1]
    assert worst(without, with_it) > 0.01  # the auxiliary loss matters here
    errors.append(both(model, input_ids=ids, labels=ids, output_router_logits=True))
    print(errors)
    assert max(errors) <= EXACT  # measured 1e-15


def test_logits_and_a_loss_of_ones_own() -> None:
    """Without labels the head is the model's, whole, on swept hidden states."""
    model, ids = large(llama()), tokens()

    def run() -> dict[str, Tensor]:
        with widened():
            logits = model(input_ids=ids).logits
            (logits.log_softmax(-1)[:, -1].square().mean() + logits.sigmoid()[:, 3].sum()).backward()
        return taken(model)

    expected = run()
    enable(model)
    assert worst(run(), expected) <= EXACT  # measured 5e-15
    assert sweeps(model) == 1


def test_hidden_states_of_a_model_without_a_head() -> None:
    model, ids = large(llama()).model, tokens()

    def run() -> dict[str, Tensor]:
        with widened():
            hidden = model(input_ids=ids).last_hidden_state
            (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum().backward()
        return taken(model)

    expected = run()
    enable(model)
    assert worst(run(), expected) <= EXACT  # measured 4e-15
    assert sweeps(model) == 1


@pytest.mark.parametrize("answer", ["tuple", "last logits", "ignored index"])
def test_what_the_head_in_pieces_does_not_do_goes_to_the_models_own(answer: str) -> None:
    model, ids = large(llama()), tokens()
    given: dict[str, Any] = {"tuple": {"return_dict": False}, "last logits": {"logits_to_keep": 9}}.get(answer, {})
    labels = ids[:, -9:] if answer == "last logits" else ids
    if answer == "ignored index":
        given, labels = {"ignore_index": -7}, ids.masked_fill(torch.rand(ids.shape) < 0.3, -7)

    def run() -> tuple[float, int, dict[str, Tensor]]:
        with widened():
            found = model(input_ids=ids, labels=labels, **given)
            loss = found[0]
            loss.backward()
        return loss.item(), found[1].shape[1], taken(model)

    loss, length, expected = run()
    enable(model)
    got_loss, got_length, got = run()
    assert (got_loss, got_length) == (pytest.approx(loss, rel=1e-12), length)
    assert worst(got, expected) <= EXACT  # measured 5e-15
    assert sweeps(model) == 1


def test_logits_that_are_not_kept_say_so() -> None:
    model, ids = enable(large(llama())), tokens()
    found = model(input_ids=ids, labels=ids)
    assert not hasattr(found, "logits")
    assert list(found) == ["loss", "past_key_values"]
    with pytest.raises(InputError, match="are not kept"):
        _ = found[:2]
    with pytest.raises(InputError, match="logits of a forward with labels are not kept in training"):
        _ = found.logits


REFUSED: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "left padding": (
        lambda ids: {"attention_mask": (torch.arange(44) >= 9).expand(2, -1).long()},
        r"zeros before ones \(padding on the left, or holes\).*padding_side = 'right'",
    ),
    "a hole": (
        lambda ids: {"attention_mask": (torch.arange(44) != 9).expand(2, -1).long()},
        r"zeros before ones \(padding on the left, or holes\)",
    ),
    "a 4-D mask": (
        lambda ids: {"attention_mask": torch.ones(2, 1, 44, 44).tril()},
        r"attention_mask of shape \[2, 1, 44, 44\]: expected \[batch, time\] = \[2, 44\]",
    ),
    "a mask of another kind": (lambda ids: {"attention_mask": {"full_attention": None}}, "attention_mask of dict"),
    "labels at padding": (
        lambda ids: {"attention_mask": (torch.arange(44) < 30).expand(2, -1).long()},
        "the loss reads the model's outputs at padding.*expected labels of -100 there",
    ),
    "hidden states": (lambda ids: {"output_hidden_states": True}, "output_hidden_states=True in training"),
    "attentions": (lambda ids: {"output_attentions": True}, "output_attentions=True in training"),
    "a cache": (
        lambda ids: {"past_key_values": transformers.DynamicCache()},
        "past_key_values was given in training.*a gradient into a cache is not supported",
    ),
    "an unknown tensor": (
        lambda ids: {"bbox": torch.ones(2, 44, 4)},
        "the model was given bbox in training, of which slimgrad does not know how it is cut",
    ),
    "an unknown option": (lambda ids: {"is_causal": True}, "was given is_causal in training"),
    "both tokens and embeddings": (
        lambda ids: {"inputs_embeds": torch.zeros(2, 44, 32).double()},
        "expected input_ids or inputs_embeds, one of them",
    ),
    "three axes of positions": (
        lambda ids: {"position_ids": torch.zeros(3, 2, 44).long()},
        r"position_ids of shape \[3, 2, 44\]: expected \[batch, time\]",
    ),
    "packed rows with a mask": (
        lambda ids: {
            "position_ids": positions((0, 20), 44).expand(2, -1),
            "attention_mask": torch.ones(2, 44).long(),
        },
        "rows of several documents .* came with an attention_mask",
    ),
    "lengths beside other positions": (
        lambda ids: {
            "position_ids": positions((0, 20), 44).expand(2, -1),
            "cu_seq_lens_q": torch.tensor([0, 20, 30, 44, 88]),
        },
        "cu_seq_lens_q names other documents than position_ids",
    ),
    "types of tokens": (
        lambda ids: {"token_type_ids": torch.ones(2, 44).long()},
        "was given token_type_ids, with which chunks would give other outputs than a whole pass",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name_before_any_work(what: str) -> None:
    given, message = REFUSED[what]
    model, ids = enable(large(llama())), tokens()
    layers = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: layers.append(1))
    with pytest.raises(InputError, match=message):
        model(input_ids=ids, labels=ids, **given(ids))
    assert not layers
    assert not taken(model)


def test_a_loss_of_ones_own_that_reads_padding() -> None:
    model, ids = enable(large(llama())), tokens()
    mask = (torch.arange(44) < torch.tensor([44, 29])[:, None]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    with pytest.raises(InputError, match="the loss reads the model's outputs at padding"):
        logits.square().sum().backward()
    assert taken(model).keys() <= {"lm_head.weight"}  # the head is the loss' own


def test_padding_tokens_that_move_positions() -> None:
    """RoBERTa's family counts positions by the padding token, over the whole row."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=97, is_decoder=True, pad_token_id=5, **sizes)
    model, ids = without_dropout(large(transformers.RobertaForCausalLM(config))), tokens()
    ids[ids == 5] = 6
    error = both(model, input_ids=ids, labels=ids)
    print(error)
    assert error <= EXACT  # measured 5e-12: key biases
    enable(model)
    ids[:, 9] = 5
    with pytest.raises(InputError, match=r"token 5 \(the padding token\) stands before other tokens"):
        model(input_ids=ids, labels=ids)


def test_several_devices_in_one_process() -> None:
    model = enable(large(llama()))
    with pytest.raises(ModelError, match=re.escape("torch.nn.DataParallel copies the model per device")):
        model._replicate_for_data_parallel()
    with pytest.raises(ModelError, match=re.escape("torch.nn.DataParallel copies the model per device")):
        model.model._replicate_for_data_parallel()
    slimgrad.hf.disable(model)
    assert model._replicate_for_data_parallel() is not model


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_accelerate_moves(when: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = llama(), tokens()
    if when == "after":
        slimgrad.hf.enable(model, chunk=13)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="has a hook of Accelerate's that moves weights between devices"):
        slimgrad.hf.enable(model) if when == "before" else model(input_ids=ids, labels=ids)


def test_what_is_not_a_model() -> None:
    with pytest.raises(ModelError, match="expected a transformers model, got Linear"):
        slimgrad.hf.enable(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="the model is not enabled"):
        slimgrad.hf.disable(llama())
    model = slimgrad.hf.enable(llama())
    with pytest.raises(InputError, match="the model is enabled already"):
        slimgrad.hf.enable(model)
