"""The routings that a region may be, by its ops and constants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from moec.ir.graph import Graph, Op
from moec.ir.ops.routing.routing import Routing
from moec.ir.traits import CHOICES


def hypotheses(region: Graph, k: int, dtype: str, experts: int) -> Iterator[Routing]:
    """The routings that the region's ops and constants allow, the most likely first.

    Groups without an effect are left out: all groups are kept, or groups are ranked by their best
    member and at least k of them are kept.
    """
    names = {op.name.split(".")[1] for op in region.ops}
    constants = _constants(region)
    scores, weightings = _score_functions(before_choices(region)), _score_functions(region.ops)
    divides = bool(names & {"div", "reciprocal"})
    renorms = (True, False) if divides else (False,)
    epsilons = [*(c for c in constants["add"] if 0 < c < 1e-2), 0.0]
    scales = [c for c in constants["mul"] if c != 1.0]
    if len(constants["mul"]) > 1:
        scales.append(math.prod(constants["mul"]))
    scales += [*(1.0 / c for c in constants["div"] if c), 1.0]
    groupings = [
        (groups, top_groups, kind)
        for groups in _group_counts(region, experts)
        for top_groups in _top_ks(region)
        for kind in ("max", "top2sum")
        if top_groups < groups and not (kind == "max" and top_groups >= k)
    ]
    groupings.append((1, 1, "max"))
    jitters = [c / 2 for c in constants["gt"] if c > 0]
    functions = itertools.product((*scores, "none"), ("none", *weightings), renorms)
    for score, after, renorm in functions:
        for (groups, top_groups, kind), scale in itertools.product(groupings, scales):
            for epsilon in epsilons if renorm else (0.0,):
                yield Routing(
                    k, score, after, renorm, epsilon, scale, groups, top_groups, kind, dtype=dtype
                )
    for jitter in jitters:
        yield Routing(k, "sparsemixer", jitter=jitter, dtype=dtype)


def _score_functions(ops: Iterable[Op]) -> list[str]:
    names = {op.name.split(".")[1] for op in ops}
    return [
        *(["softmax"] if names & {"softmax", "_softmax", "exp"} else []),
        *(["sigmoid"] if "sigmoid" in names else []),
    ]


def before_choices(region: Graph) -> Iterable[Op]:
    """The ops by whose results something is chosen; all of them if no op chooses.

    A function of the logits is no score if the choice does not depend on it. Above logits of 17, a
    sigmoid in float32 is 1 for all of them, and a choice by it is another one than by the logits.
    """
    choices = [op for op in region.ops if op.name in CHOICES]
    before: dict[Op, None] = {}
    stack = [value for op in choices for value in op.inputs]
    while stack:
        op = region.producers.get(stack.pop())
        if op is not None and op not in before:
            before[op] = None
            stack += op.inputs
    return before if choices else region.ops


def _constants(region: Graph) -> Mapping[str, list[float]]:
    constants: dict[str, list[float]] = {"add": [], "mul": [], "div": [], "gt": []}
    for op in region.ops:
        kind = op.name.split(".")[1]
        kind = "gt" if kind in ("ge", "lt", "le") else "add" if kind == "clamp" else kind
        for name in ("other", "min"):
            value = op.attrs.get(name)
            if (
                kind in constants
                and isinstance(value, int | float)
                and value not in constants[kind]
            ):
                constants[kind].append(float(value))
    return constants


def _group_counts(region: Graph, experts: int) -> list[int]:
    counts: dict[int, None] = {}
    for op in region.ops:
        for value in op.outputs:
            if len(value.shape) >= 3 and isinstance(value.shape[-2], int):
                groups = value.shape[-2]
                if 1 < groups < experts and groups * cast(int, value.shape[-1]) == experts:
                    counts[groups] = None
    return list(counts)


def _top_ks(region: Graph) -> list[int]:
    ks = [op.attrs["k"] for op in region.ops if op.name == "aten.topk.default"]
    return sorted({k for k in ks if isinstance(k, int)} | {1})
