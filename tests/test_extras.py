"""Without the extras the library works, and what needs one says so in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from slimgrad import InputError
from slimgrad.errors import MissingExtraError
from slimgrad.extras import EXTRAS, require_extra

ROOT = Path(__file__).parents[1]
# as if no extra were installed: neither found nor imported
HIDDEN = """
import sys
from slimgrad.extras import EXTRAS, module_of
hidden = {module_of(package) for packages in EXTRAS.values() for package in packages}
sys.modules.update(dict.fromkeys(hidden))
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
"""


def without_extras(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", HIDDEN + program], capture_output=True, text=True)


def test_the_library_works_without_any_extra(tmp_path: Path) -> None:
    program = f"""
import pathlib, torch, slimgrad as sg
from slimgrad.data import Documents
from slimgrad.models import Performer, PerformerConfig
from slimgrad.runs.snapshot import read_snapshot, restore, save_snapshot
model = Performer(PerformerConfig(layers=1, width=8, heads=1))
tokens = torch.arange(16, dtype=torch.uint8)[None]
sg.backward(model, tokens, chunk=4)
assert sg.verify(model, tokens, chunk=4).passed
sgd = torch.optim.SGD(model.parameters())
restore(read_snapshot(save_snapshot(pathlib.Path({str(tmp_path)!r}), step=1, model=model, optimizer=sgd)), model, sgd)
print("fine")
"""
    done = without_extras(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["reproduce", "--quick"]])
def test_the_command_says_one_sentence(arguments: list[str]) -> None:
    done = without_extras(f"sys.argv[1:] = {arguments}\nfrom slimgrad.cli import main; main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"slimgrad: the command line: expected the packages {', '.join(EXTRAS['train'])}, which are not installed. "
        "Run: pip install 'slimgrad[train]'\n"
    )


@pytest.mark.parametrize("module", ["slimgrad.bytelm", "slimgrad.bytelm.config", "slimgrad.paper.report"])
def test_a_module_that_needs_an_extra_says_which(module: str) -> None:
    done = without_extras(f"import {module}")
    assert done.returncode == 1
    assert re.search(
        r"slimgrad\.bytelm: expected .* not installed\. Run: pip install 'slimgrad\[train\]'$", done.stderr
    )


def test_what_is_missing_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("train", "anything")
    monkeypatch.setitem(EXTRAS, "train", ("typer", "no_such_package"))
    message = "anything: expected no_such_package, which is not installed. Run: pip install 'slimgrad[train]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)) as raised:
        require_extra("train", "anything")
    assert isinstance(raised.value, InputError)
    assert isinstance(raised.value, ImportError)
    require_extra("train", "anything", "typer")


def names(requirements: list[str]) -> list[str]:
    """Of packages, without this project's own extras."""
    found = [re.split("[><=]", requirement)[0] for requirement in requirements]
    return [name for name in found if not name.startswith("slimgrad")]


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == list(packages)
    assert names(project["dependencies"]) == ["torch", "numpy", "jaxtyping", "safetensors"]
