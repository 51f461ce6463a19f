"""The ordered passes from a captured graph to one that code is generated from: read this first.

Level 0 does what code generation needs; 1 adds the fusions of MoE blocks; 2 those of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import UsageError
from moec.passes.canonicalise import Canonicalise
from moec.passes.expand_experts import ExpandExperts
from moec.passes.fold_addend import FoldAddend
from moec.passes.fold_constants import FoldConstants
from moec.passes.fold_mask import FoldMask
from moec.passes.fuse_activation import FuseActivation
from moec.passes.fuse_attention import FuseAttention
from moec.passes.fuse_dispatch import FuseDispatch
from moec.passes.fuse_gate import FuseGate
from moec.passes.fuse_norm import FuseNorm
from moec.passes.fuse_rotary import FuseRotary
from moec.passes.recognise import RECOGNISERS
from moec.passes.runner import Pass
from moec.passes.share_common import ShareCommon
from moec.passes.split_packed import SplitPacked

ORDER: tuple[tuple[int, Pass], ...] = (
    # ATEN: one spelling per idea
    (0, Canonicalise()),
    (0, ShareCommon()),
    # the dense part of a transformer
    (2, FuseNorm()),
    (2, FuseAttention()),
    (2, FoldMask()),
    (2, FuseRotary()),
    # MOE: whose routing and experts these are
    *((0, recogniser) for recogniser in RECOGNISERS),
    (0, Canonicalise()),
    (1, FuseGate()),
    (0, SplitPacked()),
    (1, FoldAddend()),
    (0, FoldConstants()),
    # GROUPED: all rows at once, in as few kernels as possible
    (0, ExpandExperts()),
    (1, FuseActivation()),
    (1, FuseDispatch()),
    (0, ShareCommon()),
    (0, FoldConstants()),
)
LEVELS = (0, 1, 2)


def distinct() -> tuple[Pass, ...]:
    """Each pass once, in the order in which it first runs."""
    return tuple({pass_.name: pass_ for _, pass_ in ORDER}.values())


PASSES = distinct()


def choose(opt_level: int = 2, changes: str = "") -> tuple[Pass, ...]:
    """The passes of a level, with `changes` such as "+fuse-gate,-fold-addend".

    Raises UsageError for a pass or a level that does not exist, or one that cannot be left out.
    """
    if opt_level not in LEVELS:
        raise UsageError(f"there is no optimisation level {opt_level}; levels are 0, 1 and 2")
    added, removed = _changes(changes)
    return tuple(
        pass_
        for level, pass_ in ORDER
        if pass_.name not in removed and (level <= opt_level or pass_.name in added)
    )


def _changes(changes: str) -> tuple[set[str], set[str]]:
    names = [pass_.name for pass_ in PASSES]
    needed = {pass_.name for level, pass_ in ORDER if level == 0}
    added: set[str] = set()
    removed: set[str] = set()
    for change in filter(None, (part.strip() for part in changes.split(","))):
        sign, name = change[0], change[1:]
        if sign not in "+-" or name not in names:
            raise UsageError(
                f"--passes {change}: write +name or -name, where name is one of {', '.join(names)}"
            )
        if sign == "-" and name in needed:
            raise UsageError(f"--passes {change}: code cannot be generated without {name}")
        (added if sign == "+" else removed).add(name)
    return added, removed


def until(passes: Sequence[Pass], stop_after: str | None) -> tuple[Pass, ...]:
    """The passes up to the last one called `stop_after`, or `stop_after-…`.

    Raises UsageError where there is none.
    """
    if stop_after is None:
        return tuple(passes)
    if stop_after == "capture":
        return ()
    places = [i for i, p in enumerate(passes) if p.name == stop_after]
    places = places or [i for i, p in enumerate(passes) if p.name.startswith(f"{stop_after}-")]
    if not places:
        names = ", ".join(dict.fromkeys(p.name for p in passes))
        raise UsageError(f"--stop-after {stop_after}: no such pass; there are capture, {names}")
    return tuple(passes[: places[-1] + 1])
