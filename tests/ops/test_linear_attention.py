"""Every form of causal linear attention computes the same thing, exactly differentiated."""

import logging

import pytest
import torch
from torch import Tensor

from slimgrad.errors import SweepError
from slimgrad.ops.linear_attention import FORMS, add_states, forms, get_form, linear_attention, zero_state
from slimgrad.ops.linear_attention.parts import Parts, State

from .cases import NAMES, Case, error, make_case, run

normalizers = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])

# torch's own forward mode compiles a few decompositions with torch.jit.script when it is first used
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def block_for(name: str, block: int) -> int | None:
    return block if name == "blocked" else None


@forward_mode
@normalizers
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_with_initial_and_final_state(name: str, normalize: bool) -> None:
    case = make_case(1, 2, 5, 3, 2, 4, normalize=normalize)

    def call(q: Tensor, k: Tensor, v: Tensor, R: Tensor, S: Tensor | None = None) -> tuple[Tensor, ...]:
        y, state = linear_attention(q, k, v, (R, S), normalize=normalize, impl=name, block=block_for(name, 2))
        return (y, *(x for x in state if x is not None))

    inputs = [x.requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)


@normalizers
@pytest.mark.parametrize("shape", [(2, 67, 3, 5, 7), (1, 63, 2, 4, 3), (3, 1, 2, 3, 5), (1, 65, 1, 2, 1)])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "quadratic"])
def test_agrees_with_the_quadratic_reference(name: str, shape: tuple[int, ...], normalize: bool) -> None:
    case = make_case(2, *shape, normalize=normalize)
    want = run("quadratic", case)
    for block in [None, 1, 8, 64] if name == "blocked" else [None]:
        have = run(name, case, block=block)
        for key in want:
            assert error(have[key], want[key]) < 5e-15, (key, block)  # measured: at most 6.7e-16


def test_more_than_one_group_of_blocks() -> None:
    # 3 heads and blocks of 2: 21 blocks to a group, so 131 tokens are three groups, a rest and a short block
    case = make_case(3, 1, 131, 3, 4, 5)
    want, have = run("recurrent", case), run("blocked", case, block=2)
    for key in want:
        assert error(have[key], want[key]) < 5e-15, key  # measured: 5.1e-16


@normalizers
@pytest.mark.parametrize("name", NAMES)
def test_any_split_of_the_time_axis(name: str, normalize: bool) -> None:
    case = make_case(4, 2, 37, 2, 3, 5, normalize=normalize)
    want = run(name, case, block=block_for(name, 8))
    for cuts in [(1,), (36,), (8, 16, 24, 32), (3, 4, 20), tuple(range(1, 37))]:
        have = run(name, case, cuts=cuts, block=block_for(name, 8))
        for key in want:
            assert error(have[key], want[key]) < 5e-15, (key, cuts)  # measured: at most 6.1e-16


@pytest.mark.parametrize("name", NAMES)
def test_a_later_input_never_moves_an_earlier_output(name: str) -> None:
    T, t = 41, 19
    case = make_case(5, 1, T, 2, 3, 4)
    y, _ = linear_attention(case.q, case.k, case.v, (case.R, case.S), impl=name, block=block_for(name, 8))
    for which in ("q", "k", "v"):
        moved = {n: getattr(case, n).clone() for n in ("q", "k", "v")}
        moved[which][:, t:] = getattr(case, which)[:, t:] * 3 + 1
        y_moved, _ = linear_attention(*moved.values(), (case.R, case.S), impl=name, block=block_for(name, 8))
        assert torch.equal(y[:, :t], y_moved[:, :t]), which
        assert not torch.allclose(y[:, t:], y_moved[:, t:]), which


@normalizers
@pytest.mark.parametrize("final_state", [True, False], ids=["state", "outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_at_most_twice_that_of_the_references(
    dtype: torch.dtype, final_state: bool, normalize: bool
) -> None:
    case = make_case(6, 1, 257, 2, 16, 24, normalize=normalize).to(dtype, torch.float32)
    truth = run("quadratic", case.to(torch.float64), final_state=final_state)
    plain = [run(n, case, final_state=final_state) for n in ("quadratic", "recurrent")]
    have = run("blocked", case, final_state=final_state)
    for key, want in truth.items():
        floor = torch.finfo(torch.float32).eps
        allowed = 2 * max(floor, *(error(p[key], want) for p in plain))
        # measured: 0.4 to 1.0 times the larger of the two; at most 1.8e-7 in float32, 2.4e-3 in bfloat16
        assert error(have[key], want) <= allowed, key
        assert have[key].dtype is plain[0][key].dtype


@normalizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_totals_have_the_same_bits_in_every_mode(dtype: torch.dtype, normalize: bool) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    case = make_case(7, 1, 131, 3, 17, 9, normalize=normalize).to(dtype, wide)
    form = get_form("blocked")

    def totals(*, grad: bool, attend: bool) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            q, k, v = (x.clone().requires_grad_(grad) for x in (case.q, case.k, case.v))
            parts = form.block_sums(k, v, normalize=normalize)
            if attend:
                y = form.attend(q, parts, (case.R, case.S))
                if grad:
                    y.sum().backward()
            return [x.detach().clone() for x in parts.total if x is not None]

    want = totals(grad=False, attend=False)
    assert all(x.dtype is wide for x in want)
    for grad in (True, False):
        for attend in (True, False):
            assert all(map(torch.equal, want, totals(grad=grad, attend=attend)))


def test_outputs_have_the_same_bits_with_and_without_grad() -> None:
    case = make_case(8, 2, 131, 3, 17, 9, dtype=torch.float32)
    with torch.no_grad():
        want, _ = linear_attention(case.q, case.k, case.v, (case.R, case.S))
    assert torch.equal(run("blocked", case)["y"], want)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_touch_the_sums(name: str) -> None:
    case = make_case(9, 1, 19, 2, 3, 5, dtype=torch.float32)
    want = run(name, case)
    have = run(name, case, autocast=True)
    for key in want:
        assert torch.equal(have[key], want[key]), key
    if name == "blocked":  # a backward pass under autocast is nothing torch promises, but this one is by hand
        with torch.autocast("cpu", dtype=torch.bfloat16):
            have = run(name, case)
        for key in want:
            assert torch.equal(have[key], want[key]), key


def test_mixed_dtypes_as_autocast_leaves_them() -> None:
    case = make_case(10, 1, 67, 2, 3, 5, dtype=torch.float32)
    mixed = Case(case.q, case.k, case.v.bfloat16(), case.R, case.S, case.dy.bfloat16(), case.R_grad, case.S_grad)
    want, have = run("quadratic", mixed), run("blocked", mixed)
    for key in want:
        assert have[key].dtype is want[key].dtype
        assert error(have[key], want[key]) < 1e-3, key  # measured: 1.3e-7; one bfloat16 rounding may flip


def test_layouts_that_are_not_contiguous() -> None:
    case = make_case(11, 2, 67, 3, 4, 4)
    want = run("quadratic", case)
    fused = torch.cat([case.q, case.k, case.v], -1).requires_grad_()
    q, k, v = fused.chunk(3, -1)
    y, _ = linear_attention(q, k, v, (case.R, case.S), block=8)
    (grad,) = torch.autograd.grad(y.transpose(1, 2), fused, case.dy.transpose(1, 2))
    y_want, _ = linear_attention(q, k, v, (case.R, case.S), impl="quadratic")
    (grad_want,) = torch.autograd.grad(y_want, fused, case.dy)
    assert error(y, want["y"]) < 5e-15  # measured: 2e-16
    assert error(grad, grad_want) < 5e-15  # measured: 5e-16


def test_gradients_where_only_some_inputs_need_them() -> None:
    case = make_case(12, 1, 23, 2, 3, 4)
    form = get_form("blocked")
    want = run("quadratic", case)
    k = case.k.clone().requires_grad_()
    parts = form.block_sums(k, case.v, block=8)
    y = form.attend(case.q, parts, (case.R, case.S))
    after = add_states((case.R, case.S), parts.total)
    (dk,) = torch.autograd.grad([y, *after], [k], [case.dy, case.R_grad, case.S_grad])
    assert error(dk, want["dk"]) < 5e-15  # measured: 3e-16
    parts = form.block_sums(k, case.v, block=8)
    (dk,) = torch.autograd.grad([parts.total[1]], [k], [case.S_grad])
    assert torch.equal(dk, case.S_grad.unsqueeze(1).expand_as(k))


@forward_mode
@normalizers
@pytest.mark.parametrize("name", NAMES)
def test_functional_forward_mode_against_finite_differences(name: str, normalize: bool) -> None:
    case = make_case(13, 1, 13, 2, 3, 4, normalize=normalize)
    g = torch.Generator().manual_seed(14)
    tangents = tuple(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in case.inputs)

    def call(q: Tensor, k: Tensor, v: Tensor, R: Tensor, S: Tensor | None = None) -> tuple[Tensor, ...]:
        y, state = linear_attention(q, k, v, (R, S), normalize=normalize, impl=name, block=block_for(name, 4))
        return (y, *(x for x in state if x is not None))

    _, have = torch.func.jvp(call, tuple(case.inputs), tangents)
    h = 1e-6
    ahead = call(*(x + h * t for x, t in zip(case.inputs, tangents, strict=True)))
    behind = call(*(x - h * t for x, t in zip(case.inputs, tangents, strict=True)))
    for x, a, b in zip(have, ahead, behind, strict=True):
        assert error(x, (a - b) / (2 * h)) < 1e-8  # measured: 5e-10, the differences' own rounding


def test_a_second_reverse_differentiation_raises() -> None:
    case = make_case(15, 1, 7, 2, 3, 4)
    q = case.q.requires_grad_()
    y, _ = linear_attention(q, case.k, case.v)
    (dq,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(SweepError, match="differentiated again"):
        dq.sum().backward()
    y, _ = linear_attention(q, case.k, case.v)
    (dq,) = torch.autograd.grad(y.sum(), q, create_graph=True)  # what comes in is a constant
    with pytest.raises(SweepError, match="differentiated again"):
        dq.sum().backward()


def test_no_state_is_a_state_of_zeros() -> None:
    case = make_case(16, 2, 9, 2, 3, 4)
    for normalize in (True, False):
        y, _ = linear_attention(case.q, case.k, case.v, normalize=normalize)
        zeros = zero_state(case.k, case.v, normalize=normalize)
        y_zeros, _ = linear_attention(case.q, case.k, case.v, zeros, normalize=normalize)
        assert torch.equal(y, y_zeros)
        assert (zeros[1] is None) is not normalize


def test_auto_is_blocked_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    forms._auto.cache_clear()
    with caplog.at_level(logging.INFO, "slimgrad.ops"):
        assert get_form("auto") is get_form() is FORMS["blocked"]
    assert [r.getMessage() for r in caplog.records] == [
        "linear attention: 'auto' is 'blocked': the fastest form measured, with memory linear in the length"
    ]


def refused(match: str, form: str, q: Tensor, k: Tensor, v: Tensor, before: State, **options: object) -> None:
    with pytest.raises(ValueError, match=match):
        linear_attention(q, k, v, before, impl=form, **options)  # pyright: ignore[reportArgumentType]


def test_errors_say_what_was_expected_and_what_came() -> None:
    case = make_case(17, 1, 9, 2, 3, 4)
    q, k, v, R, S = case.inputs
    refused(r"among \['auto', 'blocked', .*'recurrent'\]; got 'flash'", "flash", q, k, v, (R, S))
    refused(r"positive number of tokens; got 0", "blocked", q, k, v, (R, S), block=0)
    for name in NAMES:
        refused(r"k \[1, 8, 2, 3\] and v \[1, 9, 2, 4\]", name, q, k[:, 1:], v, (R, S))
        refused(r"at least one token; got k \[1, 0", name, q[:, :0], k[:, :0], v[:, :0], (R, S))
        refused(r"expected floating k and v; got k torch.int64", name, q, k.long(), v, (R, S))
        refused(r"q of k's shape \[1, 9, 2, 3\]; got q \[1, 8, 2, 3\]", name, q[:, 1:], k, v, (R, S))
        refused(
            r"R of the state before to be \[1, 2, 3, 4\] torch.float64; got \[1, 2, 3, 3\]",
            name,
            q,
            k,
            v,
            (R[..., 1:], S),
        )
        refused(r"got \[1, 2, 3, 4\] torch.float32: start from zero_state", name, q, k, v, (R.float(), S))
        refused(r"S of the state before to be a tensor; got None", name, q, k, v, (R, None))
        refused(r"S of the state before to be None; got \[1, 2, 3\]", name, q, k, v, (R, S), normalize=False)
        if name != "blocked":
            refused(r"only the blocked form has blocks; got 8", name, q, k, v, (R, S), block=8)
    plain: Parts = get_form("iterative").block_sums(k, v)
    with pytest.raises(ValueError, match="use this form's own block_sums"):
        get_form("blocked").attend(q, plain, (R, S))
