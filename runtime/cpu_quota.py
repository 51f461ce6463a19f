"""How much processor time the control groups of a process allow, in processors.

A container with `--cpus 2` on a host of 64 sees 64 processors and may use 2 of them: with 64
threads it is stopped for most of each period. Version 2 of control groups has the quota in
cpu.max (Linux, Documentation/admin-guide/cgroup-v2.rst), version 1 in cpu.cfs_quota_us and
cpu.cfs_period_us (Documentation/scheduler/sched-bwc.rst). That of a group holds for all below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Processors, perhaps a fraction; infinity where there is no limit, or none is told."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return math.inf
    return min((_limit(folder) for folder in _folders(lines, root)), default=math.inf)


def _folders(lines: list[str], root: Path) -> Iterator[Path]:
    """The folders of the groups that a process is in, and of those above them. A container may see
    its own group as the root."""
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):
            yield top / parent
            if not controllers:
                yield root / "unified" / parent


def _limit(folder: Path) -> float:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text().strip() for name in names)
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return math.inf
