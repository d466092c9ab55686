"""A limit on memory is the kernel's, or is refused."""

from __future__ import annotations

import sys

import pytest

from slimgrad import InputError
from slimgrad.budget import process
from slimgrad.budget.process import limit_memory


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all data on Linux alone")
def test_a_limit_below_what_is_held_is_refused() -> None:
    with pytest.raises(InputError, match=r"a memory limit of 1 MB: expected more than the [\d,]+ MB that Python and"):
        limit_memory(1_000_000)


def test_without_a_kernel_that_counts_data_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "proc_status", lambda _: None)
    with pytest.raises(InputError, match="expected Linux, whose RLIMIT_DATA counts"):
        limit_memory(1 << 40)
