"""The short attack: no crash, no hang, no exit code 70, and no unrequested action. The long one is
`python -m tests.attack`. Further tests show that it detects each of these."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.attack import attack
from tests.attack.kinds import KINDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attack")
    for write in {kind.seeds for kind in KINDS.values()}:
        write(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_attack(kind: str, folder: Path) -> None:
    faults = [*attack(kind, seed=1, first=0, last=KINDS[kind].short, folder=folder)]
    assert not faults, "\n".join(map(str, faults))


def test_a_crash_and_a_hang_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends or is silent is distinguished from one that is done."""
    real = subprocess.Popen
    programs = iter(
        [
            'import os; print(\'{"case": 0, "words": ["run"]}\', flush=True); os.abort()',
            'import time; print(\'{"case": 1, "words": ["verify"]}\', flush=True); time.sleep(60)',
            'print(\'{"case": 2, "words": ["run"]}\', flush=True)\nwhile True: pass',
            'print(\'{"case": 3, "words": ["list"], "fault": "exit code 70"}\')',
        ]
    )

    def start(words: list[str], **how: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-c", next(programs)], **how)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(subprocess, "Popen", start)
    faults = [*attack("forged", 0, 0, 4, folder, seconds=1)]
    says = "it has waited for 2 s, and nothing wakes it"  # 1.5, rounded to even
    assert [(fault.case, re.sub(r"used \d+", "used 1", fault.says)) for fault in faults] == [
        (0, "crashes: the process ended with -6"),
        (1, f"hangs: {says}"),
        (2, "hangs: it has used 1 s of a processor"),
        (3, "exit code 70"),
    ]


WATCHED = """
import os, pickle, subprocess, sys
from pathlib import Path
from tests.attack.watch import Watch
folder = Path(sys.argv[1])
watch = Watch((folder / "mine",))
with watch.acts() as acts:
    import csv  # reads a compiled module
    (folder / "mine").mkdir()
    (folder / "mine/file").write_text("x")
assert acts == [], acts
with watch.acts() as acts:
    os.system("true")
    subprocess.run(["true"])
    pickle.loads(b"cos\\nsystem\\n.")
    (folder / "other").write_text("x")
print([act.partition("(")[0].partition(" ")[0] for act in acts])
"""


def test_what_nobody_asked_for_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['os.system', 'subprocess.Popen', 'pickle.find_class', 'writes']\n"
