"""The public face, name by name: a change here is a change for users."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

import slimgrad as sg

PUBLIC = {
    "Binomial",
    "CausalModel",
    "Chunked",
    "ConsumedError",
    "Event",
    "Every",
    "Growing",
    "InputError",
    "Keep",
    "LossMismatchError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "PrefixSum",
    "Reader",
    "Rebuild",
    "Report",
    "Result",
    "RunError",
    "SavedSink",
    "Schedule",
    "Segment",
    "SlimgradError",
    "State",
    "StateMismatchError",
    "StepReport",
    "StorageError",
    "SweepError",
    "adapters",
    "backward",
    "evaluate",
    "hf",
    "loss",
    "outputs",
    "plan",
    "receive_state",
    "send_state",
    "token_loss",
    "verify",
    "verify_step",
}


def test_exported_names_are_these() -> None:
    assert set(sg.__all__) == PUBLIC
    assert sg.__all__ == sorted(sg.__all__)
    assert all(hasattr(sg, name) for name in PUBLIC)
    assert dir(sg) == sg.__all__
    with pytest.raises(AttributeError, match="module 'slimgrad' has no attribute 'nothing'"):
        sg.nothing  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_every_exported_name_is_described() -> None:
    for name in PUBLIC:
        assert getattr(sg, name).__doc__, name


LIGHT = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import slimgrad
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
for name in set(slimgrad.__all__) - {"adapters", "hf"}:
    getattr(slimgrad, name)
loaded = set(sys.modules) - before
assert not torch.cuda.is_initialized()
from slimgrad.extras import EXTRAS, module_of
heavy = {"transformers", "datasets", "triton", "urllib.request", "http.client"}
heavy |= {module_of(package) for packages in EXTRAS.values() for package in packages}
print(sorted(name for name in loaded if name in heavy or name.split(".")[0] in heavy))
print(sorted(name for name in loaded if name.startswith("slimgrad.") and name.split(".")[1] in
             ("cli", "bytelm", "data", "models", "hf", "paper", "adapters")))
"""


def test_import_is_light() -> None:
    found = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[]\n[]\n"


@pytest.mark.parametrize("package", ["bytelm", "data", "models"])
def test_every_name_of_a_package_is_where_its_stub_says(package: str) -> None:
    found = importlib.import_module(f"slimgrad.{package}")
    assert found.__all__
    for name in found.__all__:  # a module of that name would stand in its place
        assert not isinstance(getattr(found, name), types.ModuleType), name
