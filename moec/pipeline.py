"""The phases from a captured graph to the graph from which code is generated: read this first.

    CANONICALISE  one form for each computation
    DENSE         the dense part of a transformer as ops: norms, attention, rotary embeddings
    RECOGNISE     routers and experts are found and proved; from here on the graph has MoE blocks
    SIMPLIFY      cleans up between and inside the blocks
    LOWER         fuses gates, then computes all rows of all experts at once, in few kernels
    DECODE        for the program that continues texts, which is derived from the lowered one
    TRAIN         for a block that `torch.compile` trains: products that have gradients

`moec.compile` runs all phases, `moec.transform` those up to the last pass that changes the model,
`torch.compile` CANONICALISE and RECOGNISE on its graph, and on each block the rest, or TRAIN where
it needs gradients; ONNX export all phases of a model. Level 0 has what code generation needs; 1
adds the fusions of MoE blocks, 2 those of the rest. OPT_IN passes change what a model computes
(APPROXIMATE), or need additional information (EXACT_OPT_IN). They run only on request, at the stage
that they take.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from torch.nn import Module

from moec.capture.doors import open_source
from moec.capture.source import Source
from moec.errors import UsageError
from moec.ir.formats.notation import Format, Quantisation
from moec.ir.graph import Stage
from moec.passes.approximate.aggregate_experts import AggregateExperts
from moec.passes.approximate.average_experts import AverageExperts
from moec.passes.approximate.choices.choose_experts import ChooseExperts
from moec.passes.approximate.compress_experts import CompressExperts
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.approximate.keep_used import KeepUsed
from moec.passes.approximate.merge_experts import MergeExperts
from moec.passes.approximate.prune_experts import PruneExperts
from moec.passes.approximate.refactor_dense import RefactorDense
from moec.passes.approximate.training.recover_routers import RecoverRouters
from moec.passes.approximate.training.tune_grids import TuneGrids
from moec.passes.calibration.session import Approximate, CalibrationSession, MeasuredPass
from moec.passes.core.names import sign_and_name, split
from moec.passes.core.options import parse_pass
from moec.passes.core.runner import Kind, OptInPass, Pass, PassResult
from moec.passes.decode.fuse_append import FuseAppend
from moec.passes.dense.fold_mask import FoldMask
from moec.passes.dense.fuse_attention import FuseAttention
from moec.passes.dense.fuse_norm import FuseNorm
from moec.passes.dense.fuse_residual import FuseResidual
from moec.passes.dense.fuse_rotary import FuseRotary
from moec.passes.lower.expand_convolutions import ExpandConvolutions
from moec.passes.lower.expand_experts import ExpandExperts
from moec.passes.lower.expand_forced import ExpandForced
from moec.passes.lower.expand_hierarchies import ExpandHierarchies
from moec.passes.lower.expand_mixtures import ExpandMixtures
from moec.passes.lower.expand_neurons import ExpandNeurons
from moec.passes.lower.expand_routers import ExpandRouters
from moec.passes.lower.expand_soft_mixtures import ExpandSoftMixtures
from moec.passes.lower.fuse_activation import FuseActivation
from moec.passes.lower.fuse_combine import FuseCombine
from moec.passes.lower.fuse_decompress import FuseDecompress
from moec.passes.lower.fuse_dispatch import FuseDispatch
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.parallel.plan_parallelism import PlanParallelism
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.passes.quantise.gptq_codes import CalibratedQuantisation
from moec.passes.quantise.keep_codes import KeepCodes
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.passes.quantise.quantise_linears import QuantiseLinears
from moec.passes.recognise import RECOGNISERS
from moec.passes.recognise.forms.soft.hierarchy import RecogniseHierarchies
from moec.passes.recognise.forms.soft.mixture import RecogniseMixtures
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.fold_addend import FoldAddend
from moec.passes.simplify.fold_constants import FoldConstants
from moec.passes.simplify.fold_permutes import FoldPermutes
from moec.passes.simplify.join_calls import JoinCalls
from moec.passes.simplify.join_linears import JoinLinears
from moec.passes.simplify.share_common import ShareCommon
from moec.passes.simplify.share_experts import ShareExperts
from moec.passes.simplify.split_packed import SplitPacked
from moec.passes.specialise.fold_lora import FoldLora
from moec.passes.specialise.fold_supernet import FoldSupernet
from moec.passes.specialise.hoist_routers import HoistRouters
from moec.passes.specialise.specialise import Specialise
from moec.spelling import did_you_mean


@dataclass(frozen=True)
class Phase:
    """Passes in their order, each with the least level at which it runs."""

    name: str
    leveled: tuple[tuple[int, Pass], ...]

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(pass_ for _, pass_ in self.leveled)

    def at_level(
        self, level: int, added: Set[str] = frozenset(), removed: Set[str] = frozenset()
    ) -> tuple[Pass, ...]:
        """The passes of a level, with those `added` to it and without those `removed`, by name."""
        return tuple(
            pass_
            for least, pass_ in self.leveled
            if pass_.name not in removed and (least <= level or pass_.name in added)
        )


CANONICALISE = Phase("canonicalise", ((0, Canonicalise()), (0, ShareCommon())))
DENSE = Phase("dense", ((2, FuseNorm()), (2, FuseAttention()), (2, FoldMask()), (2, FuseRotary())))
RECOGNISE = Phase("recognise", tuple((0, recogniser) for recogniser in RECOGNISERS))
SIMPLIFY = Phase(
    "simplify",
    (
        (0, Canonicalise()),
        (0, SplitPacked()),
        (1, RecogniseHierarchies()),
        (1, RecogniseMixtures()),
        (1, ShareExperts()),
    ),
)
LOWER = Phase(
    "lower",
    (
        (1, JoinCalls()),
        (1, FuseGate()),
        (1, FoldAddend()),
        (0, FoldConstants()),
        (0, ExpandExperts()),
        (0, ExpandForced()),
        (0, ExpandRouters()),
        (0, ExpandMixtures()),
        (0, ExpandHierarchies()),
        (0, ExpandSoftMixtures()),
        (0, ExpandNeurons()),
        (1, ExpandConvolutions()),
        (1, FuseActivation()),
        (1, FuseDispatch()),
        (0, FuseDecompress()),
        (0, ShareCommon()),
        (0, FoldConstants()),
        (2, FuseResidual()),
        (2, FoldPermutes()),
    ),
)
DECODE = Phase("decode", ((2, FuseAppend()),))
TRAIN = Phase("train", ((0, ExpandExperts()), (0, FuseCombine())))
PHASES = (CANONICALISE, DENSE, RECOGNISE, SIMPLIFY, LOWER)

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
EXACT_OPT_IN: tuple[type[OptInPass], ...] = (
    Specialise,
    HoistRouters,
    FoldLora,
    FoldSupernet,
    JoinLinears,
    AggregateExperts,
    PlanParallelism,
)
OPT_IN: tuple[type[Approximate] | type[OptInPass], ...] = (*APPROXIMATE, *EXACT_OPT_IN)
LEVELS = (0, 1, 2)

# Passes with command-line options of their own; they run after all others.
ON_REQUEST: tuple[tuple[str, Pass], ...] = (
    ("--quant", QuantiseExperts(Format("int8"))),
    ("--quant", QuantiseLinears(Format("int8"))),
)


def quantising(formats: Quantisation) -> tuple[Pass, ...]:
    """The passes that store weights in these formats."""
    experts = () if formats.experts is None else (QuantiseExperts(formats.experts),)
    if formats.linears is None and formats.head is None:
        return experts
    return (*experts, QuantiseLinears(formats.linears, formats.head))


def keeping(source: Source, row_bits: int) -> tuple[Pass, ...]:
    """The pass that keeps the codes of the source's checkpoint, if it has any and rows may be
    rounded to `row_bits` bits (0: the weights are dequantised)."""
    if source.codes is None or not row_bits or not isinstance(source.model, Module):
        return ()
    parameters = source.model.named_parameters()
    names = {p.untyped_storage().data_ptr(): name for name, p in parameters}
    return (KeepCodes(source.codes(), names, row_bits),)


def all_passes() -> tuple[Pass, ...]:
    """Each pass that `--passes` may name, in the order in which it first runs: all but TRAIN's."""
    passes = (pass_ for phase in (*PHASES, DECODE) for pass_ in phase.passes)
    return tuple({pass_.name: pass_ for pass_ in passes}.values())


PassSpec = Pass | Approximate
PassChanges = str | Sequence[str | Approximate | OptInPass]
"""Text such as "+fuse-gate,-fold-addend", or a list of such texts and of opt-in passes."""


@dataclass(frozen=True)
class _Changes:
    added: frozenset[str]
    removed: frozenset[str]
    opt_in: tuple[Approximate | OptInPass, ...]

    def in_stages(self, *stages: Stage) -> list[Approximate | OptInPass]:
        """The opt-in passes that take one of these stages; approximate ones take recognised
        blocks."""
        return [
            pass_
            for pass_ in self.opt_in
            if (pass_.takes if isinstance(pass_, OptInPass) else Stage.MOE) in stages
        ]


def choose(opt_level: int = 2, changes: PassChanges = "") -> tuple[PassSpec, ...]:
    """The passes of a level, with `changes`. Opt-in passes run in the order given, at the stage
    that they take: before blocks are recognised, after that, or at the end.

    Raises UsageError for a pass or a level that does not exist, one that cannot be left out, or
    options that a pass does not have.
    """
    if opt_level not in LEVELS:
        raise UsageError(f"there is no optimisation level {opt_level}; levels are 0, 1 and 2")
    parsed = _parse(changes)

    def at_level(*phases: Phase) -> list[Pass]:
        each = (phase.at_level(opt_level, parsed.added, parsed.removed) for phase in phases)
        return [pass_ for passes in each for pass_ in passes]

    return (
        *at_level(CANONICALISE),
        *parsed.in_stages(Stage.ATEN),
        *at_level(DENSE, RECOGNISE, SIMPLIFY),
        *parsed.in_stages(Stage.MOE),
        *at_level(LOWER),
        *parsed.in_stages(Stage.GROUPED),
    )


def decode_passes(opt_level: int = 2, changes: PassChanges = "") -> tuple[Pass, ...]:
    """The passes of a level, with `changes`, that run on the program that continues texts."""
    parsed = _parse(changes)
    return DECODE.at_level(opt_level, parsed.added, parsed.removed)


def _parse(changes: PassChanges) -> _Changes:
    kinds = {str(kind.name): kind for kind in OPT_IN}
    needed = {pass_.name for phase in PHASES for level, pass_ in phase.leveled if level == 0}
    added: set[str] = set()
    removed: set[str] = set()
    opt_in: list[Approximate | OptInPass] = []
    items = [changes] if isinstance(changes, str) else changes
    for item in (part for one in items for part in (split(one) if isinstance(one, str) else [one])):
        if isinstance(item, Approximate | OptInPass):
            opt_in.append(item)
            continue
        if not isinstance(item, str):
            raise UsageError(f"passes holds a {type(item).__name__}: give text or passes")
        (sign, name), (_, bracket, options) = sign_and_name(item), item.partition("(")
        if sign == "-" and name in needed:
            raise UsageError(f"--passes {item}: code generation needs {name}")
        if sign == "-" and name in kinds:
            raise UsageError(f"--passes {item}: {name} is off by default: leave it out")
        if bracket and (not options.endswith(")") or name not in kinds):
            why = f"{name} has no options" if name not in kinds else "the list ends with )"
            raise UsageError(f"--passes {item}: {why}")
        if name in kinds:
            opt_in.append(parse_pass(kinds[name], options.removesuffix(")"), f"--passes {item}"))
        else:
            (added if sign == "+" else removed).add(name)
    return _Changes(frozenset(added), frozenset(removed), tuple(opt_in))


def exact(passes: Sequence[PassSpec], why: str) -> tuple[Pass, ...]:
    """The passes, none of which may change the model. Raises UsageError, with `why`, otherwise."""
    for pass_ in passes:
        if isinstance(pass_, Approximate) or pass_.kind is Kind.CHANGES:
            raise UsageError(f"{pass_.name} changes what the model computes: {why}")
    return tuple(pass_ for pass_ in passes if not isinstance(pass_, Approximate))


def prepare(passes: Sequence[PassSpec], session: CalibrationSession) -> tuple[Pass, ...]:
    """The passes in the form in which they run: approximate ones are measured and kept within the
    budget, quantising ones choose codes on the calibration data, if there is any, routers are
    trained on them, and the second model of `aggregate-experts` is opened.

    Raises UsageError and CaptureError for a second model that cannot be opened.
    """

    def prepare_pass(pass_: PassSpec) -> Pass:
        if isinstance(pass_, Approximate):
            return MeasuredPass(pass_, session)
        if isinstance(pass_, QuantiseExperts | QuantiseLinears) and session.calib is not None:
            return CalibratedQuantisation(pass_, session.calib, session.files)
        if isinstance(pass_, FixedFormats) and pass_.calibrated:
            return CalibratedQuantisation(pass_, session.calib, session.files)
        if isinstance(pass_, ChooseExperts | RecoverRouters):
            return replace(pass_, session=session)
        if isinstance(pass_, AggregateExperts) and pass_.other and isinstance(pass_.other, str):
            return replace(pass_, other=open_source(pass_.other).model)
        return pass_

    return tuple(map(prepare_pass, passes))


def from_stage(passes: Sequence[Pass], stage: Stage) -> tuple[Pass, ...]:
    """The passes without those whose work is already done in a program of `stage`: a module that is
    a graph has its blocks recognised."""
    return tuple(pass_ for pass_ in passes if stage <= pass_.takes)


def after_recognition(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes that remain for a recognised block."""
    last = max(i for i, pass_ in enumerate(passes) if pass_ in RECOGNISE.passes)
    return tuple(passes[last + 1 :])


def lowering(passes: Sequence[PassSpec]) -> tuple[Pass, ...]:
    """The passes from the first on that is only among those of LOWER."""
    ours = [pass_ for pass_ in LOWER.passes if pass_ not in CANONICALISE.passes]
    first = next(i for i, pass_ in enumerate(passes) if pass_ in ours)
    return exact(passes[first:], "it runs before blocks are lowered")


def truncate_after(passes: Sequence[PassSpec], stop_after: str | None) -> tuple[PassSpec, ...]:
    """The passes up to the last one called `stop_after`, or `stop_after-…`.

    Raises UsageError where there is none.
    """
    if stop_after is None:
        return tuple(passes)
    if stop_after == "capture":
        return ()
    ends = [i for i, p in enumerate(passes) if p.name == stop_after]
    ends = ends or [i for i, p in enumerate(passes) if p.name.startswith(f"{stop_after}-")]
    if not ends:
        names = ", ".join(dict.fromkeys(p.name for p in passes))
        near = did_you_mean(stop_after, [p.name for p in passes])
        raise UsageError(
            f"--stop-after {stop_after}: no such pass{near or f'; there are capture, {names}'}"
        )
    return tuple(passes[: ends[-1] + 1])


def without_effect(pass_results: Sequence[PassResult]) -> tuple[str, ...]:
    """Sentences about the opt-in passes that changed nothing, with the reasons."""
    names = {str(kind.name) for kind in OPT_IN}
    sentences = []
    for pass_result in pass_results:
        if pass_result.name not in names:
            continue
        layers = pass_result.damage.layers if pass_result.damage else ()
        if layers and all(line.undone for line in layers):
            sentences.append(
                f"{pass_result.name} changed nothing: in every layer it exceeded the budget and "
                "was undone"
            )
        elif pass_result.rewrites == 0:
            reasons = dict.fromkeys(declined.reason for declined in pass_result.declined)
            why = "; ".join(reasons) or "it applies to nothing in the model"
            sentences.append(f"{pass_result.name} changed nothing: {why}")
    return tuple(sentences)
