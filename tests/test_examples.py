"""Every example runs, in a process of its own and with warnings as errors, and says what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
KEY_LINES = {
    "01_exact_gradient.py": "what is saved does not grow with the length",
    "02_your_own_model.py": "GatedRecurrence: exact; recalls",
    "03_key_value_cache.py": "going on from a cache of 100 rows",
    "04_packed_documents.py": "packed documents: exact",
    "05_segments_in_two_processes.py": "two processes against one: gradients differ by at most",
    "06_data_parallel.py": "process 1 of 2: its gradients differ from one process by at most",
    "07_preference_loss.py": "preference between two sequences: gradients differ by",
}


def test_every_example_is_listed() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(KEY_LINES)


@pytest.mark.parametrize("name", KEY_LINES)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert KEY_LINES[name] in done.stdout
    header = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
    assert f"python examples/{name}" in header
