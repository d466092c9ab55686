"""The child process of `programme`: one point, from standard input to the last line that it prints."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from slimgrad.paper.peak import describe_machine


def call(function: str, task: dict[str, Any]) -> dict[str, Any]:
    """Call "module:name" with the task's entries as keywords; the result, beside what it was measured on."""
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**task)
    return {"result": result, "machine": describe_machine()}


if __name__ == "__main__":
    print(json.dumps(call(**json.load(sys.stdin))))
