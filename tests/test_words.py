"""Names say a type or a role: participles and pronouns do not, and their number only falls."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("moec", "passes", "codegen", "runtime", "tests", "benchmarks", "examples", "docs")
WORDS = {
    "asked",
    "found",
    "given",
    "kept",
    "known",
    "made",
    "own",
    "place",
    "places",
    "said",
    "seen",
    "some",
    "taken",
    "those",
    "wanted",
    "whole",
}
MOST = dict.fromkeys(FOLDERS, 0) | {"tests": 1}
"""How many assignments each folder has left: the one of the tests is the buffer of a model."""


def assignments(tree: ast.AST) -> Counter[str]:
    """How often each of the words is assigned to, as a variable, a parameter or a field."""
    names = (
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        or isinstance(node, ast.arg)
    )
    return Counter(name for name in names if name in WORDS)


def test_names_say_a_type_or_a_role() -> None:
    counts = {}
    for folder in FOLDERS:
        files = (p for p in (ROOT / folder).rglob("*.py") if not _linked(p))
        counts[folder] = sum((assignments(ast.parse(p.read_text())) for p in files), Counter())
    totals = {folder: count.total() for folder, count in counts.items()}
    more = {folder: count for folder, count in totals.items() if count > MOST[folder]}
    assert not more, f"{more}, at most {MOST}: {sum(counts.values(), Counter()).most_common(20)}"


def _linked(path: Path) -> bool:
    """Whether it is reached through one of the three links of moec/."""
    return any(parent.is_symlink() for parent in path.parents)


def test_what_counts() -> None:
    tree = ast.parse("made = 1\ndef f(found, graph):\n    for place in found: made.x = place")
    assert assignments(tree) == {"made": 1, "found": 1, "place": 1}
