"""Every numbered example runs as from a shell. (`make demo` runs the demonstration.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import Program, Result, Warm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NUMBERED = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
STARTS_RANKS = "14_run_ranks"


def run_alone(path: Path) -> Result:
    """The result of an example in a process of its own."""
    process = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=EXAMPLES.parent
    )
    return Result(process.returncode, process.stdout, process.stderr)


@pytest.mark.parametrize("path", NUMBERED, ids=lambda path: path.stem)
def test_example(path: Path, request: pytest.FixtureRequest) -> None:
    if path.stem == STARTS_RANKS:
        result = run_alone(path)
    else:
        warm: Warm = request.getfixturevalue("warm")
        result = warm.run(Program(path.read_text(encoding="utf-8"), str(path)), EXAMPLES.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
