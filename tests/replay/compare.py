"""The difference between the records of two runs, as text."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tests.replay.records import Folder, Record

LINES = 40
"""Of one difference so many lines are shown."""


@dataclass(frozen=True)
class Change:
    """Two texts of one kind and name by one owner; None where a side has no such text."""

    kind: str
    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Comparison:
    """`changes` with the owners that show each; owners that one run alone has, by key."""

    texts: int
    changes: dict[Change, list[str]]
    only_before: list[str]
    only_after: list[str]


def compare(before: Folder, after: Folder) -> Comparison:
    """Owners are compared by key; one that got another key is recognised by equal records.

    Raises ValueError where a run recorded nothing: then equality would mean nothing.
    """
    old, new = _by_key(before), _by_key(after)
    for name, owners in (("base", old), ("this commit", new)):
        if not owners:
            raise ValueError(f"the run of {name} recorded nothing")
    lost = {key: runs for key, runs in old.items() if key not in new}
    gained = {key: runs for key, runs in new.items() if key not in old}
    _drop_equal(lost, gained)
    changes: dict[Change, list[str]] = defaultdict(list)
    for key in sorted(old.keys() & new.keys()):
        for change in _changes(old[key], new[key]):
            changes[change].append(key)
    texts = {record for runs in new.values() for run in runs for record in run}
    return Comparison(len(texts), dict(changes), sorted(lost), sorted(gained))


Runs = Counter[tuple[Record, ...]]
"""The sorted records of all owners of one key."""


def _by_key(folder: Folder) -> dict[str, Runs]:
    by_key: dict[str, Runs] = {}
    for owner in folder.owners():
        runs = by_key.setdefault(owner.key, Counter())
        records = tuple(sorted(owner.records))
        runs[records] = 1 if owner.shared else runs[records] + 1
    return by_key


def _drop_equal(lost: dict[str, Runs], gained: dict[str, Runs]) -> None:
    """Take out the owners that have the same records under another key."""
    keys = defaultdict(list)
    for key, runs in gained.items():
        keys[frozenset(runs.items())].append(key)
    for key, runs in list(lost.items()):
        if same := keys[frozenset(runs.items())]:
            del lost[key], gained[same.pop()]


def _changes(old: Runs, new: Runs) -> Iterator[Change]:
    """Equal runs of one key are matched: several files have tests of the same name."""
    lost, gained = list((old - new).elements()), list((new - old).elements())
    while lost:
        run = lost.pop(0)
        other = max(gained, key=lambda r: len(set(run) & set(r)), default=())
        if other:
            gained.remove(other)
        yield from _pairs(Counter(run), Counter(other))
    for run in gained:
        yield from _pairs(Counter(), Counter(run))


def _pairs(old: Counter[Record], new: Counter[Record]) -> Iterator[Change]:
    """The records of one owner that differ, those of one name together."""
    sides: dict[tuple[str, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, records in enumerate((old - new, new - old)):
        for record in records.elements():
            sides[record.kind, record.name][side].append(record.digest)
    for (kind, name), (before, after) in sides.items():
        for index in range(max(len(before), len(after))):
            yield Change(
                kind,
                name,
                before[index] if index < len(before) else None,
                after[index] if index < len(after) else None,
            )


def report(comparison: Comparison, before: Folder, after: Folder) -> Iterator[str]:
    """Lines for people: what only one run has, each difference once, and how many there are."""
    for side, keys in (("base", comparison.only_before), ("this commit", comparison.only_after)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            yield f"only at {side}, compared with nothing: {', '.join(keys[:5])}{more}"
    for lines, (title, *others) in _alike(comparison, before, after):
        yield ""
        yield f"{title}, and {len(others)} more that differ alike:" if others else title
        yield from lines[:LINES]
        if len(lines) > LINES:
            yield f"... {len(lines) - LINES} lines more"
    tests = {key for keys in comparison.changes.values() for key in keys}
    if comparison.changes:
        yield ""
        yield f"replay: {len(comparison.changes)} differences in {len(tests)} tests"
    else:
        yield f"replay: no difference in {comparison.texts} graphs, programs and kernels"


def _alike(
    comparison: Comparison, before: Folder, after: Folder
) -> Iterator[tuple[list[str], list[str]]]:
    """The difference of two texts, and the titles of all changes that have its changed lines."""
    differences: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for change, owners in comparison.changes.items():
        old = [] if change.before is None else before.text(change.before).splitlines()
        new = [] if change.after is None else after.text(change.after).splitlines()
        lines = list(difflib.unified_diff(old, new, "base", "this commit", lineterm="", n=2))
        changed = (change.kind, *(line for line in lines[2:] if line[0] in "+-"))
        _, titles = differences.setdefault(changed, (lines, []))
        titles.extend(f"{change.kind} {change.name} of {owner}" for owner in owners)
    yield from differences.values()
