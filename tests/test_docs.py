"""The documentation is true: its code runs, its links lead somewhere, its commands exist, its errors are raised.

A block that cannot run is preceded by `<!-- not run: reason -->`; `python -m tests.test_docs` lists these.
"""

from __future__ import annotations

import ast
import logging
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import typer

from slimgrad.cli.app import app

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*GUIDES, *(page for page in ROOT.glob("*.md") if page.stat().st_size)]
COMMANDS = typer.main.get_command(app)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Block(NamedTuple):
    """One fenced block: its language, the line of the page before its first, its text, why it does not run."""

    language: str
    line: int
    text: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    fence = re.compile(
        r"(?:<!-- not run: (?P<reason>.+?) -->\s*?\n\s*)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S
    )
    text = page.read_text(encoding="utf-8")
    for match in fence.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(match["language"], line, match["text"], match["reason"]))
    return found


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_runs(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.getLogger("slimgrad").level
    namespace: dict[str, object] = {"__name__": page.stem}
    try:
        for block in blocks(page):
            if block.language == "python" and block.not_run is None:
                # as many empty lines in front as the page has, so that a traceback names the page's own line
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    finally:
        logging.root.handlers[:] = handlers
        logging.getLogger("slimgrad").setLevel(level)
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]+src=\"([^\"]+)\"", text)
    broken = [
        link
        for link in links
        if not ADDRESS.match(link) and not link.startswith("#") and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert not broken


def test_every_guide_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [guide.name for guide in GUIDES if guide.name != "README.md" and f"]({guide.name})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist(page: Path) -> None:
    lines = [
        line
        for block in blocks(page)
        if block.language in ("sh", "bash", "console")
        for line in block.text.splitlines()
    ]
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert targets is not None
    for line in lines:
        words = shlex.split(re.sub(r"<[^>]*>", "something", line.removeprefix("$ ")), comments=True)
        if words[:1] == ["slimgrad"] and len(words) > 1:
            command = COMMANDS if words[1].startswith("-") else cast(Any, COMMANDS).commands[words[1]]
            known = {"--help", *(name for parameter in command.params for name in parameter.opts)}
            assert {word for word in words if word.startswith("--")} <= known, line
        elif words[:1] == ["make"]:
            wanted = {word for word in words[1:] if "=" not in word}
            assert wanted <= set(targets[1].split()), line
        elif words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "tests.")):
            assert ROOT.joinpath(*words[2].split(".")).with_suffix(".py").exists(), line


def test_the_errors_of_the_guide_are_those_of_the_code() -> None:
    messages = "\n".join(
        part.value
        for file in (ROOT / "src").rglob("*.py")
        for part in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )
    guide = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8").partition("## Errors")[2]
    phrases = re.findall(r"^\| `([^`]+)` \|", guide, re.M)
    assert len(phrases) > 10
    assert [phrase for phrase in phrases if phrase not in messages] == []


def test_no_page_names_a_package_index() -> None:
    given = re.compile(r"(?:--index-url|TORCH_INDEX=)\s*`?(?P<what>[^\s`]*)")
    for page in PAGES:
        for match in given.finditer(page.read_text(encoding="utf-8")):
            assert match["what"] in ("", ".") or match["what"].startswith(("<", "...", ".")), (ids(page), match[0])


if __name__ == "__main__":
    for page_ in PAGES:
        for block_ in blocks(page_):
            if block_.not_run is not None:
                print(f"{ids(page_)}:{block_.line + 1}: {block_.not_run}")
