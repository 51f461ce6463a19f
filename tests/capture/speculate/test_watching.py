"""The recorded directions of branches, on this Python and on newer ones if they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moec.capture.speculate import watching
from moec.capture.user_code import sites
from tests.capture.speculate import branching


def test_branches_are_seen_both_ways() -> None:
    assert branching.seen(sites, watching) == branching.EXPECTED


ALONE = """
import importlib.util, sys, types
for name in ("moec", "moec.capture", "moec.capture.speculate", "moec.capture.user_code"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
sites, watching, branching = map(load, (
    "moec.capture.user_code.sites", "moec.capture.speculate.watching", "branching"), sys.argv[1:])
assert branching.seen(sites, watching) == branching.EXPECTED, branching.seen(sites, watching)
"""


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_a_newer_python_reports_branches_itself(version: str) -> None:
    """sys.monitoring in the place of sys.settrace; neither file needs torch."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"Python {version} is not installed")
    files = [str(Path(str(part.__file__))) for part in (sites, watching, branching)]
    result = subprocess.run([python, "-c", ALONE, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
