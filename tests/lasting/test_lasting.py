"""The short form of `python -m tests.lasting`: compiling, loading and forking leak nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lasting.__main__ import Footprint, is_flat


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_short_life() -> None:
    words = [sys.executable, "-W", "ignore", "-m", "tests.lasting"]
    done = subprocess.run(
        [*words, "--compiles", "4", "--loads", "24", "--forks", "4"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "TVM_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": flat: ") == 3


def test_growth_is_noticed() -> None:
    flat = [Footprint(100.0, 500), Footprint(101.0, 501)]
    assert is_flat(flat)
    assert not is_flat([*flat, Footprint(107.0, 501)])
    assert not is_flat([*flat, Footprint(101.0, 520)])
