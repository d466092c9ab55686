"""`slimgrad generate`: the library's bytes, as they are in a pipe and printable on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from slimgrad.bytelm import generate, open_model
from slimgrad.cli.generating import run_generation
from tests.cli.running import snapshots, succeed

PROMPT = b"the quick "


def library(run: Path, prompt: bytes, num_bytes: int, **how: float) -> bytes:
    return generate(open_model(run)[0], prompt, num_bytes, **{"temperature": 0.7, **how})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ((), {}),
        (("--temperature", 0), {"temperature": 0.0}),
        (("--seed", 5, "--top-p", 0.5), {"seed": 5, "top_p": 0.5}),
        (("--temperature", 1.5), {"temperature": 1.5}),
    ],
)
def test_a_pipe_gets_the_prompt_and_the_library_s_bytes(
    options: tuple[object, ...], how: dict[str, float], trained: Path
) -> None:
    result = succeed("generate", trained, "--prompt", PROMPT.decode(), "--tokens", 40, *options)
    assert result.stdout_bytes == PROMPT + library(trained, PROMPT, 40, **how)
    assert result.stderr == ""


def test_without_options_four_hundred_bytes_follow_a_line_s_end(trained: Path) -> None:
    assert succeed("generate", trained).stdout_bytes == b"\n" + library(trained, b"\n", 400)


def test_no_bytes_may_be_asked_for(trained: Path) -> None:
    assert succeed("generate", trained, "--prompt", "fox", "--tokens", 0).stdout_bytes == b"fox"


def test_a_prompt_may_be_any_file_of_bytes(trained: Path, tmp_path: Path) -> None:
    prompt = bytes(range(256))
    (tmp_path / "prompt").write_bytes(prompt)
    result = succeed("generate", trained, "--prompt-file", tmp_path / "prompt", "--tokens", 20)
    assert result.stdout_bytes == prompt + library(trained, prompt, 20)


def test_a_prompt_beyond_ascii_goes_in_as_utf_8(trained: Path) -> None:
    prompt = "é€🦊"
    result = succeed("generate", trained, "--prompt", prompt, "--tokens", 5)
    assert result.stdout_bytes == prompt.encode() + library(trained, prompt.encode(), 5)


def test_a_snapshot_and_a_model_s_file_generate_too(trained: Path) -> None:
    last = snapshots(trained)[-1]
    texts = {
        succeed("generate", path, "--tokens", 20).stdout_bytes for path in (trained, last, last / "model.safetensors")
    }
    assert len(texts) == 1


def test_a_terminal_gets_printable_text(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    prompt = "fox\x1b[31m\ré"
    run_generation(
        trained, prompt=prompt, prompt_file=None, tokens=60, temperature=3.0, top_p=1.0, seed=0, device="cpu"
    )
    shown = terminal.getvalue()
    assert shown.startswith("fox\N{REPLACEMENT CHARACTER}[31mé")
    assert shown.endswith("\n")
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert "\N{REPLACEMENT CHARACTER}" in shown[len(prompt) :]
