"""For every test of slimgrad.hf: no network, certificates in a folder of the session, others' own warnings left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# what these libraries warn of among themselves; by message and where it comes from, never ours
_OTHERS = (
    "ignore:`.*` is deprecated and will be removed in v6:FutureWarning",
    "ignore:.*:DeprecationWarning:(transformers|peft|trl|accelerate|datasets|bitsandbytes|multiprocess|dill)",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for line in _OTHERS:
                item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture(scope="session", autouse=True)
def _certificates(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SLIMGRAD_CACHE"] = str(tmp_path_factory.mktemp("certificates"))
