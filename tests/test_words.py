"""Names say a type or a role, docstrings and messages use plain verbs: exceptions become fewer."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("moec", "passes", "codegen", "runtime", "tests", "benchmarks", "examples", "docs")
WORDS = {
    "asked",
    "found",
    "given",
    "gone",
    "got",
    "kept",
    "known",
    "made",
    "meant",
    "mine",
    "own",
    "place",
    "places",
    "said",
    "seen",
    "some",
    "taken",
    "those",
    "told",
    "wanted",
    "who",
    "whole",
}
MOST = dict.fromkeys(FOLDERS, 0)
"""How many assignments each folder may have."""

BARE = {
    *("after", "again", "alike", "alone", "behind", "beside", "between", "both", "either", "else"),
    *("only", "other", "others", "rest", "same", "such", "then", "together", "under"),
    *("what", "within", "without"),
}
"""Prepositions, pronouns and adverbs, which say of a function neither what it does nor what it
returns."""
MOST_BARE = dict.fromkeys(FOLDERS[:4], 0)
"""The most functions of each folder that are called so."""

RIDDLES = {"asks", "lie", "lies", "stand", "stands", "stood", "tells", "whoever"}
"""Words by which docstrings spoke of code as of people and places: say `is`, `is stored`, `reads`,
`determines`, `the caller`."""
MOST_RIDDLES = dict.fromkeys(FOLDERS[:4], 0)
"""The most of them in the docstrings of each folder."""

IDIOMS = RIDDLES | {"anew", "beside", "mend", "nobody", "otherwise"}
"""Words by which messages used to be short and not understood at once."""
MOST_IDIOMS = dict.fromkeys(FOLDERS[:4], 0)
"""The most of them in the messages of each folder."""


def assignments(tree: ast.AST) -> Counter[str]:
    """How often each of the words is assigned to, as a variable, a parameter or a field."""
    names = (
        node.id if isinstance(node, ast.Name) else node.arg
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        or isinstance(node, ast.arg)
    )
    return Counter(name for name in names if name in WORDS)


def bare_functions(tree: ast.AST) -> Counter[str]:
    """How often each of the words is the name of a function or method."""
    names = (
        node.name.strip("_")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return Counter(name for name in names if name in BARE | WORDS - {"place", "places"})


def riddles(tree: ast.AST) -> Counter[str]:
    """How often each of the words is in a docstring."""
    texts = (
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    words = (word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    return Counter(word for word in words if word in RIDDLES)


def idioms(tree: ast.AST) -> Counter[str]:
    """How often each of the words is in a message: a string of three words or more that is not a
    docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
        and len(node.value.split()) > 2
    )
    words = (word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    return Counter(word for word in words if word in IDIOMS)


def test_names_say_a_type_or_a_role() -> None:
    counts = {folder: _count(folder, assignments) for folder in FOLDERS}
    totals = {folder: count.total() for folder, count in counts.items()}
    more = {folder: count for folder, count in totals.items() if count > MOST[folder]}
    assert not more, f"{more}, at most {MOST}: {sum(counts.values(), Counter()).most_common(20)}"


def test_functions_say_what_they_do_or_return() -> None:
    counts = {folder: _count(folder, bare_functions) for folder in MOST_BARE}
    more = {
        folder: dict(count) for folder, count in counts.items() if count.total() > MOST_BARE[folder]
    }
    assert not more, f"{more}, at most {MOST_BARE}"


def test_docstrings_are_plain() -> None:
    totals = {folder: _count(folder, riddles).total() for folder in MOST_RIDDLES}
    more = {folder: count for folder, count in totals.items() if count > MOST_RIDDLES[folder]}
    assert not more, f"{more}, at most {MOST_RIDDLES}; avoid {', '.join(sorted(RIDDLES))}"


def test_messages_are_plain() -> None:
    totals = {folder: _count(folder, idioms).total() for folder in MOST_IDIOMS}
    more = {folder: count for folder, count in totals.items() if count > MOST_IDIOMS[folder]}
    assert not more, f"{more}, at most {MOST_IDIOMS}; avoid {', '.join(sorted(IDIOMS))}"


def _count(folder: str, count: Callable[[ast.AST], Counter[str]]) -> Counter[str]:
    """The sum over the files of a folder."""
    files = (path for path in (ROOT / folder).rglob("*.py") if not _linked(path))
    return sum((count(ast.parse(path.read_text())) for path in files), Counter())


def _linked(path: Path) -> bool:
    """Whether it is reached through one of the three links of moec/."""
    return any(parent.is_symlink() for parent in path.parents)


def test_what_counts() -> None:
    tree = ast.parse("made = 1\ndef f(found, graph):\n    for place in found: made.x = place")
    assert assignments(tree) == {"made": 1, "found": 1, "place": 1}
    tree = ast.parse("def _both(): pass\ndef taken(self): pass\ndef sort_both(): pass")
    assert bare_functions(tree) == {"both": 1, "taken": 1}
    text = ast.parse('"""It stands there."""\nx = "lies"  # whoever asks')
    assert riddles(text) == {"stands": 1}
    assert idioms(ast.parse('"""Nobody."""\nraise E(f"no{x} rows of nobody here", "nobody")')) == {
        "nobody": 1
    }
