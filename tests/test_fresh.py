"""Programs in forks: they run, end and fail as in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fresh import Program, Warm

STATE = """
import json, os, sys
print(json.dumps([__name__, os.getcwd(), sys.argv, os.environ["VARIABLE"], os.getpgid(0)]))
sys.exit(int(sys.argv[1]))
"""


def test_a_program_has_its_own_state(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = set()
    for code in (3, 0):
        monkeypatch.setenv("VARIABLE", f"value {code}")
        result = warm.run(Program(STATE, arguments=(str(code),)), tmp_path)
        assert (result.returncode, result.stderr) == (code, "")
        *state, group = json.loads(result.stdout)
        assert state == ["__main__", str(tmp_path), ["", str(code)], f"value {code}"]
        groups.add(group)
    assert len(groups | {os.getpgid(0)}) == 3


def test_an_exception_ends_a_program_with_its_traceback(warm: Warm, tmp_path: Path) -> None:
    result = warm.run(Program("print('first')\n1 / 0\n"), tmp_path)
    assert (result.returncode, result.stdout) == (1, "first\n")
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_warning_is_an_error_where_the_program_is_strict(warm: Warm, tmp_path: Path) -> None:
    text = "import warnings\nwarnings.warn('careful')\n"
    codes = [warm.run(Program(text, strict=strict), tmp_path).returncode for strict in (0, 1)]
    assert codes == [0, 1]


def test_a_program_that_hangs_is_killed_with_what_it_started(warm: Warm, tmp_path: Path) -> None:
    text = """
import subprocess, time
from pathlib import Path
Path("pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
time.sleep(600)
"""
    with pytest.raises(TimeoutError, match="the program ran longer than 2 s"):
        warm.run(Program(text), tmp_path, limit=2)
    status = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"  # nobody has waited for it
    assert warm.run(Program("print(1)"), tmp_path).stdout == "1\n"
