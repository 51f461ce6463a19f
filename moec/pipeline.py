"""The ordered passes from a captured graph to one that code is generated from: read this first.

Level 0 does what code generation needs; 1 adds the fusions of MoE blocks; 2 those of the rest.
Passes that change what a model computes (APPROXIMATE), and exact ones that need to be told
something (ASKED), run where they are asked for alone: most of them between the two halves, when
blocks are recognised and not fused yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import UsageError
from moec.formats.integer import Format, Quantisation
from moec.ir.graph import Stage
from moec.passes.approximate.aggregate_experts import AggregateExperts
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.compress_experts import CompressExperts
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.approximate.keep_used import KeepUsed
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.approximate.refactor_dense import RefactorDense
from moec.passes.approximate.tune_grids import TuneGrids
from moec.passes.calibration.session import Approximate, Frame, Measured
from moec.passes.core.options import made_from, split
from moec.passes.core.runner import Asked, Pass, Step
from moec.passes.decode.fuse_append import FuseAppend
from moec.passes.dense.fold_mask import FoldMask
from moec.passes.dense.fuse_attention import FuseAttention
from moec.passes.dense.fuse_norm import FuseNorm
from moec.passes.dense.fuse_residual import FuseResidual
from moec.passes.dense.fuse_rotary import FuseRotary
from moec.passes.lower.expand_experts import ExpandExperts
from moec.passes.lower.fuse_activation import FuseActivation
from moec.passes.lower.fuse_decompress import FuseDecompress
from moec.passes.lower.fuse_dispatch import FuseDispatch
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.quantise.gptq_codes import Calibrated
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.passes.quantise.quantise_linears import QuantiseLinears
from moec.passes.recognise import RECOGNISERS
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.fold_addend import FoldAddend
from moec.passes.simplify.fold_constants import FoldConstants
from moec.passes.simplify.fold_permutes import FoldPermutes
from moec.passes.simplify.share_common import ShareCommon
from moec.passes.simplify.split_packed import SplitPacked
from moec.passes.specialise.fold_lora import FoldLora
from moec.passes.specialise.fold_supernet import FoldSupernet
from moec.passes.specialise.hoist_routers import HoistRouters
from moec.passes.specialise.specialise import Specialise

SPELLED: tuple[tuple[int, Pass], ...] = (
    # ATEN: one spelling per idea
    (0, Canonicalise()),
    (0, ShareCommon()),
)
RECOGNISED: tuple[tuple[int, Pass], ...] = (
    # the dense part of a transformer
    (2, FuseNorm()),
    (2, FuseAttention()),
    (2, FoldMask()),
    (2, FuseRotary()),
    # MOE: whose routing and experts these are
    *((0, recogniser) for recogniser in RECOGNISERS),
    (0, Canonicalise()),
    (0, SplitPacked()),
)
LOWERED: tuple[tuple[int, Pass], ...] = (
    (1, FuseGate()),
    (1, FoldAddend()),
    (0, FoldConstants()),
    # GROUPED: all rows at once, in as few kernels as possible
    (0, ExpandExperts()),
    (1, FuseActivation()),
    (1, FuseDispatch()),
    (0, FuseDecompress()),
    (0, ShareCommon()),
    (0, FoldConstants()),
    (2, FuseResidual()),
    (2, FoldPermutes()),
)
ORDER = (*SPELLED, *RECOGNISED, *LOWERED)
# Of the step for tokens that come in pieces, once it is derived from what ORDER made.
STEPPED: tuple[tuple[int, Pass], ...] = ((2, FuseAppend()),)
APPROXIMATE: tuple[type[Approximate], ...] = (
    PruneExperts,
    KeepUsed,
    AverageExperts,
    MergeExperts,
    CompressExperts,
    TuneGrids,
    InsertZeroExperts,
    RefactorDense,
)
ASKED: tuple[type[Asked], ...] = (
    Specialise,
    HoistRouters,
    FoldLora,
    FoldSupernet,
    AggregateExperts,
)
WANTED: tuple[type[Approximate] | type[Asked], ...] = (*APPROXIMATE, *ASKED)
LEVELS = (0, 1, 2)

# What options of their own ask for; these run after all others.
ON_REQUEST: tuple[tuple[str, Pass], ...] = (
    ("--quant", QuantiseExperts(Format("int8"))),
    ("--quant", QuantiseLinears(Format("int8"))),
)


def quantising(wanted: Quantisation) -> tuple[Pass, ...]:
    """The passes that store weights as `wanted`."""
    experts = () if wanted.experts is None else (QuantiseExperts(wanted.experts),)
    if wanted.linears is None and wanted.head is None:
        return experts
    return (*experts, QuantiseLinears(wanted.linears, wanted.head))


def distinct() -> tuple[Pass, ...]:
    """Each pass once, in the order in which it first runs."""
    return tuple({pass_.name: pass_ for _, pass_ in (*ORDER, *STEPPED)}.values())


PASSES = distinct()


Chosen = Pass | Approximate
Wanted = Approximate | Asked
Changes = str | Sequence[str | Wanted]


def choose(opt_level: int = 2, changes: Changes = "") -> tuple[Chosen, ...]:
    """The passes of a level, with `changes` such as "+fuse-gate,-fold-addend" or a list of such
    texts and of passes that run where they are asked for. Those come in the order given, in the
    stage that they take: before blocks are recognised, after it, or when all else is done.

    Raises UsageError for a pass or a level that does not exist, one that cannot be left out, or
    options that a pass does not have.
    """
    if opt_level not in LEVELS:
        raise UsageError(f"there is no optimisation level {opt_level}; levels are 0, 1 and 2")
    added, removed, wanted = _changes(changes)

    def those(half: Sequence[tuple[int, Pass]]) -> tuple[Pass, ...]:
        return _those(half, opt_level, added, removed)

    def taking(*stages: Stage) -> list[Wanted]:
        return [pass_ for pass_ in wanted if getattr(pass_, "takes", Stage.MOE) in stages]

    recognised = (*those(SPELLED), *taking(Stage.ATEN), *those(RECOGNISED))
    return (*recognised, *taking(Stage.MOE), *those(LOWERED), *taking(Stage.GROUPED))


def stepped(opt_level: int = 2, changes: Changes = "") -> tuple[Pass, ...]:
    """The passes of a level, with `changes`, that run on the step for tokens in pieces."""
    added, removed, _ = _changes(changes)
    return _those(STEPPED, opt_level, added, removed)


def _those(
    passes: Sequence[tuple[int, Pass]], opt_level: int, added: set[str], removed: set[str]
) -> tuple[Pass, ...]:
    return tuple(
        pass_
        for level, pass_ in passes
        if pass_.name not in removed and (level <= opt_level or pass_.name in added)
    )


def _changes(changes: Changes) -> tuple[set[str], set[str], list[Wanted]]:
    names = [pass_.name for pass_ in PASSES]
    kinds = {str(kind.name): kind for kind in WANTED}
    needed = {pass_.name for level, pass_ in ORDER if level == 0}
    added: set[str] = set()
    removed: set[str] = set()
    wanted: list[Wanted] = []
    items = [changes] if isinstance(changes, str) else changes
    for item in (part for one in items for part in (split(one) if isinstance(one, str) else [one])):
        if isinstance(item, Approximate | Asked):
            wanted.append(item)
            continue
        if not isinstance(item, str):
            raise UsageError(f"passes holds a {type(item).__name__}: give text or passes")
        sign, name, bracket, options = *_head(item), *item.partition("(")[1:]
        if sign not in ("+", "-") or name not in (*names, *kinds):
            raise UsageError(
                f"--passes {item}: write +name or -name, where name is one of "
                f"{', '.join((*names, *kinds))}"
            )
        if sign == "-" and name in needed:
            raise UsageError(f"--passes {item}: code cannot be generated without {name}")
        if sign == "-" and name in kinds:
            raise UsageError(f"--passes {item}: {name} runs only where it is asked for")
        if bracket and (not options.endswith(")") or name not in kinds):
            why = f"{name} has no options" if name not in kinds else "the list ends with )"
            raise UsageError(f"--passes {item}: {why}")
        if name in kinds:
            wanted.append(made_from(kinds[name], options.removesuffix(")"), f"--passes {item}"))
        else:
            (added if sign == "+" else removed).add(name)
    return added, removed, wanted


def _head(item: str) -> tuple[str, str]:
    return item[:1], item[1:].partition("(")[0].strip()


def exact(passes: Sequence[Chosen], why: str) -> tuple[Pass, ...]:
    """The passes, none of which changes the model. Raises UsageError, with `why`, for one."""
    for pass_ in passes:
        if isinstance(pass_, Approximate) or getattr(pass_, "changes", False):
            raise UsageError(f"{pass_.name} changes what the model computes: {why}")
    return tuple(pass_ for pass_ in passes if not isinstance(pass_, Approximate))


def measured(passes: Sequence[Chosen], frame: Frame) -> tuple[Pass, ...]:
    """The passes as they run: the approximate ones measured and kept within the budget, those
    that quantise with codes chosen on the calibration data, where there are any."""

    def one(pass_: Chosen) -> Pass:
        if isinstance(pass_, Approximate):
            return Measured(pass_, frame)
        if isinstance(pass_, QuantiseExperts | QuantiseLinears) and frame.calib is not None:
            return Calibrated(pass_, frame.calib, frame.files)
        return pass_

    return tuple(map(one, passes))


def onward(passes: Sequence[Pass], stage: Stage) -> tuple[Pass, ...]:
    """The passes without those whose work is done in a program of `stage`: a module that is a
    graph already has its blocks recognised."""
    return tuple(p for p in passes if set(stage.value) <= set(p.takes.value))


def until(passes: Sequence[Chosen], stop_after: str | None) -> tuple[Chosen, ...]:
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


def without_effect(steps: Sequence[Step]) -> tuple[str, ...]:
    """In words, the passes that somebody asked for by name and that changed nothing, and why."""
    names = {str(kind.name) for kind in WANTED}
    said = []
    for step in steps:
        if step.name not in names:
            continue
        layers = step.damage.layers if step.damage else ()
        if layers and all(line.undone for line in layers):
            said.append(f"{step.name} changed nothing: the budget undid it in every layer")
        elif step.rewrites == 0:
            reasons = dict.fromkeys(declined.reason for declined in step.declined)
            why = "; ".join(reasons) or "the model has nothing that it applies to"
            said.append(f"{step.name} changed nothing: {why}")
    return tuple(said)
