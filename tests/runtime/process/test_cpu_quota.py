"""A quota of processor time, from control groups of both versions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moec.runtime.process import threads
from moec.runtime.process.memory_limit import cpu_quota


def quota(folder: Path, membership: str, files: dict[str, str]) -> float:
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "self").write_text(membership)
    return cpu_quota(folder / "cgroup", folder / "self")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "400000 100000\n"}, 1.5),
        ("0::/not/here\n", {"cpu.max": "300000 100000\n"}, 3),  # a namespace of its own
        (
            "5:cpu,cpuacct:/c\n0::/\n",
            {"cpu,cpuacct/c/cpu.cfs_quota_us": "25000", "cpu,cpuacct/c/cpu.cfs_period_us": "10000"},
            2.5,
        ),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "10000"}, math.inf),
        ("5:memory:/\n", {"memory/cpu.max": "1 1"}, math.inf),
        ("nonsense", {"cpu.max": "nonsense"}, math.inf),
    ],
)
def test_quota(tmp_path: Path, membership: str, files: dict[str, str], expected: float) -> None:
    assert quota(tmp_path, membership, files) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("share", "count"), [(1.2, 2), (2.0, 2), (0.3, 1), (100.0, 4)])
def test_threads_are_no_more_than_the_quota(
    monkeypatch: pytest.MonkeyPatch, share: float, count: int
) -> None:
    monkeypatch.setattr(threads, "affine", lambda: 4)
    monkeypatch.setattr(threads, "cpu_quota", lambda: share)
    assert threads.available() == count
    assert threads.set_threads(environment={}) == count
