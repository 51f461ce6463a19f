"""A memory limit, from control groups of both versions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moec.runtime import checks
from moec.runtime.process.memory_limit import free_in_groups

V1 = {
    "memory/c/memory.limit_in_bytes": "1000\n",
    "memory/c/memory.usage_in_bytes": "700\n",
    "memory/c/memory.stat": "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 5\n",
}


def v2(folder: str, limit: str, usage: int, stat: str = "active_file 3\ninactive_file 40\n"):
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{usage}\n",
        f"{folder}memory.stat": f"anon 9\n{stat}",
    }


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", v2("", "1000", 600), 443),
        ("0::/\n", v2("", "max", 600), math.inf),
        ("0::/\n", v2("", "100", 600), 0),  # the limit was lowered meanwhile
        ("0::/\n", v2("", "1000", 600, "nonsense 1\n"), math.inf),
        ("0::/a/b\n", v2("a/b/", "1000", 600) | v2("a/", "900", 800), 143),
        ("4:memory:/c\n0::/\n", V1, 325),
        ("4:cpu:/c\n", V1, math.inf),
        ("0::/\n", {}, math.inf),
    ],
)
def test_free(tmp_path: Path, membership: str, files: dict[str, str], expected: float) -> None:
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "self").write_text(membership)
    assert free_in_groups(tmp_path / "groups", tmp_path / "self") == expected


def test_no_more_is_free_than_the_group_has(monkeypatch: pytest.MonkeyPatch) -> None:
    before = checks.free_memory()
    monkeypatch.setattr(checks, "free_in_groups", lambda: 12345)
    assert checks.free_memory() == 12345 < before
