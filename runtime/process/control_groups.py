"""The control groups of a process, as folders of files with its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def group_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of the groups of versions 1 and 2 in which a controller, such as cpu or memory,
    limits the process, and of their ancestors. A container may see its own group as the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):
            yield top / parent
            if not controllers:
                yield root / "unified" / parent
