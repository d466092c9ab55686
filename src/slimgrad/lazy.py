"""Names of a package that are imported when they are first asked for, so that `slimgrad --help` waits for no torch.

Which names, and from where, is written once: in the package's stub `__init__.pyi`, which type checkers read too.
Source: Scientific Python, SPEC 1 (lazy loading of submodules and functions).
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose stub holds lines `from MODULE import NAME as NAME`."""
    made = sys.modules[package]
    stub = ast.parse(Path(str(made.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    modules = {
        alias.name: str(statement.module)
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    names = sorted(modules)

    def imported(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if modules[name] == package:  # a module below it
            return importlib.import_module(f"{package}.{name}")
        found = getattr(importlib.import_module(modules[name]), name)
        setattr(made, name, found)
        return found

    return imported, lambda: names, names
