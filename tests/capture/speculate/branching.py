"""Code with branches, some of which are taken both ways. Other Pythons load this file alone."""

from __future__ import annotations

import sys
from typing import Any

EXPECTED = [
    ("if a:", True, 2),
    ("if not b:", True, 2),
    ("empty = not a", False, 0),
    ("if a and b:", True, 2),
    ("if a and b:", True, 2),
    ("return total if b else -total", True, 2),
]


def run(a: Any, b: Any) -> int:
    total = 0
    if a:
        total += 1
    if not b:
        total += 2
    empty = not a
    if a and b:
        total += 4
    del empty
    return total if b else -total


def seen(sites: Any, watching: Any) -> list[tuple[str, bool, int]]:
    """For each branch of `run` its line, whether it is a jump, and how many ways it was seen."""
    requests: list[Any] = []

    class Asked:
        def __bool__(self) -> bool:
            requests.append(sites.site_of(sys._getframe(1)))
            return True

    run(Asked(), Asked())
    unique = list(dict.fromkeys(requests))
    both: dict[Any, set[int]] = {}
    for a, b in ((True, False), (False, True), (True, True)):
        with watching.watched([site for site in unique if site.jumps]) as ways:
            run(a, b)
        for site, to in ways.items():
            both.setdefault(site, set()).update(to)
    return [(site.text, site.jumps, len(both.get(site, ()))) for site in unique]
