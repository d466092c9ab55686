"""What waits for the backward pass, counted and fitted."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.ops.linear_attention import get_form, linear_attention

from .cases import Case, make_case


def saved_numbers(name: str, case: Case, *, normalize: bool) -> int:
    """Count the numbers in distinct storages that autograd saves, inputs included."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    leaves = [x.clone().requires_grad_() for x in case.inputs]
    q, k, v, *state = leaves
    before = (state[0], state[1] if normalize else None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, _ = linear_attention(q, k, v, before, normalize=normalize, impl=name)
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
def test_blocked_saves_exactly_what_its_docstring_says(normalize: bool) -> None:
    B, H, M, D = 2, 3, 5, 7
    per_token = B * H * ((2 * M + 2 * D + 1) if normalize else (2 * M + D))
    once = B * H * M * ((D + 1) if normalize else D)
    for T in (1, 67, 257, 1031):
        case = make_case(1, B, T, H, M, D, normalize=normalize, dtype=torch.float32)
        assert saved_numbers("blocked", case, normalize=normalize) == per_token * T + once


def test_the_count_sees_a_state_per_token() -> None:
    # the same count on the form that keeps every state: the test above could fail
    B, T, H, M, D = 1, 67, 2, 5, 7
    case = make_case(2, B, T, H, M, D, dtype=torch.float32)
    assert saved_numbers("prefix_sum", case, normalize=True) > B * T * H * M * D
    assert saved_numbers("iterative", case, normalize=True) < B * T * H * M * D


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x._base is None:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_temporary_grows_faster_than_the_inputs() -> None:
    B, H, M, D = 1, 2, 8, 8
    for T in (257, 4099):
        case = make_case(3, B, T, H, M, D, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in case.inputs]
        form = get_form("blocked")
        with LargestTensor() as largest:
            parts = form.block_sums(leaves[1], leaves[2], block=M)
            y = form.attend(leaves[0], parts, (leaves[3], leaves[4]))
            torch.autograd.grad([y, *parts.total], leaves, [case.dy, case.R_grad, case.S_grad])
        blocks = -(-T // M)
        assert largest.numbers == max(B * T * H * D, blocks * B * H * M * D)
