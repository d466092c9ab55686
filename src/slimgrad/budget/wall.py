"""A wall behind a budget: the kernel refuses memory to a command that goes far beyond what it was given.

A plan keeps resident memory below the budget by prediction. Should one be wrong, or something else in the process grow,
the wall stops it as an error of this process, before the machine is short of memory for others.

The kernel limits no process' resident memory, but its data (RLIMIT_DATA): private pages that may be written to, used or
not. Beside what is resident these are the stacks of threads, reserved whole, what libraries may write to and never do,
and holes of the heap that were given back. While plans were made and carried out under malloc as commands set it, 90 to
160 MB more than what was resident. So the wall stands a quarter of the budget beyond it, 256 MiB at least, and the
stacks that are still to come: no plan that keeps to its budget touches it, and what runs away goes no farther.

Without a plan the wall is all there is. Then all data and the pages of files that are in memory (the code of libraries)
stay below the budget together: what is data and not resident is lost to it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

import torch

from slimgrad.budget import process
from slimgrad.errors import InputError

_LEAST, _SHARE = 256 << 20, 4
_STACK = 8 << 20  # where the stacks of threads have no limit


def set_wall(budget: int, *, has_plan: bool = True) -> int | None:
    """Limit this process, and its children, to what a budget of resident memory can need. There is no way back.

    Args:
        budget: bytes that may be resident.
        has_plan: whether something else keeps to the budget.

    Returns:
        The limit on its data in bytes. None where none was set: the platform has none, the process holds more than the
        budget already, or has a lower limit.

    Raises:
        InputError: without a plan, the process has more data already than the budget would leave it.
    """
    data, resident = process.proc_status("VmData"), process.resident_bytes()
    if sys.platform != "linux" or data is None or resident is None or resident >= budget:
        return None
    resource = cast(Any, importlib.import_module("resource"))
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stacks = 2 * (torch.get_num_threads() + 1) * (_STACK if stack == resource.RLIM_INFINITY else stack)
    if has_plan:
        wall = data + budget - resident + max(_LEAST, budget // _SHARE) + stacks
    else:
        files = process.proc_status("RssFile") or 0
        wall = budget - files
        if wall <= data:
            raise InputError(
                f"memory of {budget / 1e6:,.0f} MB without chunks: expected more than {(data + files) / 1e6:,.0f} MB, "
                "which is what Python and torch may use before any work"
            )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if any(limit not in (resource.RLIM_INFINITY, -1) and limit <= wall for limit in (soft, hard)):
        return None
    process.limit_memory(wall)
    return wall
