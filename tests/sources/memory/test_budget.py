"""A compilation keeps to its limit of memory, all that the process holds included, or is refused
at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moec
from moec.errors import UsageError
from moec.sources.memory import budget
from moec.sources.memory.budget import TooLittleMemory, budget_of
from moec.sources.memory.memory import Bounded
from tests.sources.checkpoint.families import model
from tests.sources.memory.small import SMALL, count_weights_alone

MB = 10**6


def test_the_parts_are_what_the_process_has_and_what_is_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "resident_bytes", lambda: 500 * MB)
    parts = budget_of(2000 * MB, [((128, 1024, 64), 2), ((1000, 64), 2), ((64,), 4)])
    assert parts.process == 500 * MB
    assert parts.operator == 8 * 128 * 1024 * 64  # as read, in float32 and packed
    assert parts.results == 8 * 4096 * 1000
    assert parts.left + parts.needed == 2000 * MB
    assert parts.holds(parts.left // 3)
    assert not parts.holds(parts.left // 2)
    parts.check()


@pytest.mark.parametrize("memory", ["250MiB", 10**8, "0.3GB"])
def test_a_limit_that_cannot_be_kept_is_refused_with_the_sum(
    memory: int | str, tmp_path: Path
) -> None:
    model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UsageError) as raised:
        moec.compile(tmp_path, memory=memory)
    assert re.fullmatch(
        r"this compilation may take [\d.]+ MB of memory, and needs [\d.]+ GB: [\d.]+ [MG]B of the "
        r"process, 469\.8 MB for the compiler and its graphs, [\d.]+ kB for the largest weight and "
        r"[\d.]+ MB for the results that are verified: allow more \(--memory\)",
        str(raised.value),
    )


@pytest.mark.parametrize("door", ["module", "export", "factory", "pt2"])
def test_a_limit_for_what_is_in_memory_is_refused(door: str, tmp_path: Path) -> None:
    module, x = torch.nn.Linear(4, 4).eval(), torch.zeros(2, 4)
    (tmp_path / "f.py").write_text("def make():\n    raise AssertionError('run')\n")
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "m.pt2")
    models = {
        "module": module,
        "export": program,
        "factory": f"{tmp_path / 'f.py'}:make",
        "pt2": tmp_path / "m.pt2",
    }
    with pytest.raises(UsageError, match=r"\(--memory\) limits the compilation of checkpoints"):
        moec.compile(models[door], (x,) if door == "module" else (), memory="4GiB")


def test_a_compilation_that_takes_more_than_it_may_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is: here, while eager is evaluated."""
    model("mixtral").save_pretrained(tmp_path)
    count_weights_alone(monkeypatch)

    def grow(phase: str) -> None:
        if phase == "verify":
            monkeypatch.setattr(budget, "resident_bytes", lambda: 10**9)

    with pytest.raises(TooLittleMemory, match=r"may take 32\.8 kB of memory, and needs 1\.0 GB"):
        moec.compile(tmp_path, memory=SMALL, kv_cache=False, progress=grow)


def test_weights_in_use_alone_stay_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "resident_bytes", lambda: 0)
    memory = Bounded(budget_of(1 << 30, ()))
    count = 0

    def read(tensor: torch.Tensor) -> None:
        nonlocal count
        count += 1

    pair = [memory.paged.add(torch.Size((64, 64)), torch.float32, read) for _ in range(2)]
    with memory.reading():
        assert pair[0].sum() == pair[1].sum() == pair[0].sum() == 0
        assert count == 2
        memory.paged.limit = 0  # as above the limit
        assert pair[1].sum() == pair[0].sum() == 0
    assert count == 3


PEAK = """
import resource, subprocess, sys
ended = subprocess.run([sys.executable, "-m", *sys.argv[1:]], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(ended.returncode)
"""
"""Runs a module of Python and prints its peak: a process starts with that of the one that forks it,
which is large in the middle of the tests."""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is Linux's")
def test_a_process_keeps_its_limit(tmp_path: Path) -> None:
    """By the peak that the system counted, from its start to its end."""
    large = model(
        "qwen3_moe", hidden_size=512, num_experts=32, moe_intermediate_size=512, vocab_size=1024
    )
    for parameter in large.parameters():
        parameter.data /= 4
    large.save_pretrained(tmp_path / "checkpoint")
    words = ["moec", "compile", "checkpoint", "-o", "m.moec", "--memory", "1300MB"]
    environment = {**os.environ, "MOEC_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "output", "w") as output:
        ended = subprocess.run(
            [sys.executable, "-c", PEAK, *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    text = (tmp_path / "output").read_text()
    assert ended.returncode == 0, text
    assert "eager ran layer by layer" in text
    assert int(ended.stdout) * 1024 <= 1300 * MB
