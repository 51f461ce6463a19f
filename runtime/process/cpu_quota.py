"""The processor time that the control groups of a process allow, in processors.

A container with `--cpus 2` on a host of 64 sees 64 processors and may use 2 of them: with 64
threads it is stopped for most of each period. Version 2 of control groups has the quota in
cpu.max (Linux, Documentation/admin-guide/cgroup-v2.rst), version 1 in cpu.cfs_quota_us and
cpu.cfs_period_us (Documentation/scheduler/sched-bwc.rst). A group's quota applies to all below it.
"""

from __future__ import annotations

import math
from pathlib import Path

from moec.runtime.process.control_groups import MEMBERSHIP, ROOT, group_folders


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float:
    """Processors, perhaps a fraction; infinity if there is no limit, or it is unknown."""
    folders = group_folders("cpu", root, membership)
    return min((_limit(folder) for folder in folders), default=math.inf)


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
