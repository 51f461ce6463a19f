"""Adds experts without a network to a layer: a token that chooses one needs no row of a network.

    logits = aten.linear(x, w[8, D])               logits = aten.linear(x, w[12, D], b[12])
    w, ids = moe.route(logits)                     w, ids = moe.route(logits)
    … = moe.dispatch(x, ids) <8>           ->      … = moe.dispatch(x, ids) <8>
    y = moe.combine(…, w)                          z = moe.zero_experts(x, ids, w, mix, constants)
                                                   y = moe.combine(…, w) + z

neutral: the new columns of the router have a bias of minus infinity and are never chosen, so all
outputs keep their bits. Fine-tuning sets that bias to 0 and trains the new weights.

calibrated: no training. A choice whose weight is below the limit of its expert is redirected to the
replacement with the smallest error on the calibration data: zero, the token itself, or the expert's
mean output.

    ids = where(w < limits[ids], instead[ids], ids)

The expected error of a choice is w times the root mean square error of the replacement. Each
expert's limit is the weight at which this error reaches one value, common to all experts. For the
given fraction of redirected choices, this minimises the total error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Op, Program, Ref, TensorType, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.ops.routing.routing import widened
from moec.ir.sizes.dims import symbols
from moec.ir.upcast import widen
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer, Splice, constant
from moec.passes.core.options import option, validate
from moec.passes.core.router_columns import add_columns

ROWS = 1024  # rows of an expert on which its replacement is chosen


@dataclass(frozen=True)
class InsertZeroExperts:
    """Add experts without a network: neutral ones to be trained, or replacements for choices of
    small weight."""

    way: str = option(
        "neutral",
        "neutral: experts are added that no token chooses before fine-tuning; calibrated: "
        "choices of small weight are replaced now",
        choices=("neutral", "calibrated"),
    )
    zero: int = option(1, "neutral: number of experts that return zero", low=0)
    copy: int = option(1, "neutral: number of experts that return their input", low=0)
    constant: int = option(
        2, "neutral: number of experts that mix their input with a learned vector", low=0
    )
    fraction: float = option(0.25, "calibrated: share of the choices to replace", low=0, high=1)
    by: str = option(
        "best",
        "calibrated: what replaces a choice: zero, the input (copy), the expert's mean output "
        "(constant), or the best of these for each expert",
        choices=("best", "zero", "copy", "constant"),
    )
    seed: int = option(0, "neutral: seed of the new weights", low=0)
    name: ClassVar[str] = "insert-zero-experts"
    source: ClassVar[str] = "MoE++, arXiv 2410.07348; the calibrated way is moec's own"

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        check_combinable(layer)
        if self.way == "calibrated":
            return _insert_calibrated(self, program, layer, stats)
        return _insert_neutral(self, program, layer)


def check_combinable(layer: Layer) -> None:
    """Raises NoMatch if the layer's choices cannot go to experts without a network."""
    if any(op.name == "moe.capacity" for op in layer.between):
        raise NoMatch(
            "the router drops choices beyond a capacity, which depends on the number of experts"
        )
    if len(layer.dispatch.inputs) > 2:
        raise NoMatch("the routing weights scale the inputs of the experts, not their outputs")
    if not layer.combine.attrs.get("weighted"):
        raise NoMatch("the outputs of the experts are not weighted")
    if layer.combine.attrs.get("added"):
        raise NoMatch("another branch is added inside moe.combine")
    if layer.companions:
        raise NoMatch("another block takes the same choices, and has no experts for the new ones")
    if layer.combine.inputs[2].shape != layer.dispatch.inputs[1].shape:
        raise NoMatch("each choice is dispatched as a separate token")
    if layer.output.shape != layer.dispatch.inputs[0].shape:
        raise NoMatch(f"tokens {layer.dispatch.inputs[0].type} come back as {layer.output.type}")


def _insert_neutral(options: InsertZeroExperts, program: Program, layer: Layer) -> Change:
    kinds = ("zero",) * options.zero + ("copy",) * options.copy + ("constant",) * options.constant
    if not kinds:
        raise NoMatch("zero, copy and constant are all 0: give at least one above 0")
    # The layer's name in the seed gives each layer other numbers, independent of the order of
    # layers.
    generator = torch.Generator().manual_seed(options.seed + sum(layer.name.encode()))
    splice = Splice(program)
    add_columns(splice, layer, len(kinds), generator)
    width = cast(int, layer.output.shape[-1])
    dtype = constant(program, layer.stacks[0]).dtype

    def random(*shape: int) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(shape, generator=generator) * width**-0.5
        return drawn.to(dtype)

    weights: dict[str, torch.Tensor] = {}
    if options.constant:
        weights = {
            "mix": random(options.constant, 2, width),
            "constants": random(options.constant, width),
        }
    add_zero_experts(splice, layer, kinds, weights)
    members = tuple((e,) if e < layer.count else () for e in range(layer.count + len(kinds)))
    says = ", ".join(
        f"{count} {kind}"
        for kind, count in (
            ("zero", options.zero),
            ("copy", options.copy),
            ("constant", options.constant),
        )
        if count
    )
    return Change(
        splice.done(),
        members,
        f"adds {says} to {layer.count} experts; no token chooses them before training",
    )


def add_zero_experts(
    splice: Splice,
    layer: Layer,
    kinds: tuple[str, ...],
    weights: Mapping[str, torch.Tensor],
    ids: tuple[Value, int] | None = None,
) -> None:
    """Adds moe.zero_experts of `kinds` and `weights` to the result of the layer. `ids` are the
    choices and the first id without a network, by default those of the layer."""
    like = layer.combine
    dtype = cast(DType, like.attrs["dtype"])
    experts, first = ids or (layer.dispatch.inputs[1], layer.count)
    attrs: dict[str, Attr] = {"first": first, "kinds": kinds, "weighted": True}
    if "mix" in weights:
        attrs["mixed"] = True
    inputs = [layer.dispatch.inputs[0], experts, like.inputs[2]]
    inputs += [splice.weight(f"{layer.name}.{name}", t) for name, t in weights.items()]
    routed = splice.value(layer.output.name, layer.output.type)
    ops = [replace(like, outputs=(routed,))]
    type = TensorType(dtype.name, layer.output.shape)
    zero_output = splice.emit(ops, "moe.zero_experts", inputs, type, like, **attrs, dtype=dtype)
    ops.append(Op("aten.add.Tensor", (routed, zero_output), (layer.output,), {}, None, like.origin))
    splice.put(like, ops)


@dataclass(frozen=True, eq=False)
class StandIn:
    """The replacement of an expert: a kind of moe.zero_experts, its vector [D], and the root mean
    square of its error over the rows."""

    kind: str
    vector: torch.Tensor
    misses: float


def _insert_calibrated(
    options: InsertZeroExperts, program: Program, layer: Layer, stats: LayerStats
) -> Change:
    instead = choose_stand_ins(program, layer, stats, options.by)
    misses = torch.tensor([one.misses for one in instead])
    costs = stats.weights * misses[stats.experts]
    limits, share = _limits(misses, costs, options.fraction)
    if share == 0:
        raise NoMatch(
            f"fraction={options.fraction:g} of {costs.numel()} choices rounds to no "
            "choice: give a greater share"
        )
    constants = [e for e, one in enumerate(instead) if one.kind == "constant"]
    others = sorted({one.kind for one in instead} - {"constant"})
    kinds = ("constant",) * len(constants) + tuple(others)
    table = torch.tensor(
        [
            layer.count + (constants.index(e) if e in constants else kinds.index(one.kind))
            for e, one in enumerate(instead)
        ]
    )
    splice = Splice(program)
    _redirect_choices(splice, layer, limits, table)
    dtype = constant(program, layer.stacks[0]).dtype
    vectors = [instead[e].vector.to(dtype) for e in constants]
    add_zero_experts(splice, layer, kinds, {"constants": torch.stack(vectors)} if vectors else {})
    attrs = {**layer.experts.attrs, "share": round(1 - share, 6)}
    splice.put(layer.experts, [replace(layer.experts, attrs=attrs)])
    members = (*((e,) for e in range(layer.count)), *(() for _ in kinds))
    counts = {kind: sum(one.kind == kind for one in instead) for kind in ("zero", "copy")}
    says = (
        f"{share:.1%} of the choices are replaced: by {counts['zero']} zero, {counts['copy']} "
        f"copy, {len(constants)} constant"
    )
    return Change(splice.done(), members, says)


def _limits(
    misses: torch.Tensor, costs: torch.Tensor, fraction: float
) -> tuple[torch.Tensor, float]:
    """The weight per expert below which its choices are redirected, f32[E], and the share of all
    choices that are redirected."""
    ordered = costs.flatten().sort().values
    count = min(round(fraction * ordered.numel()), ordered.numel())
    limit = float(ordered[count]) if count < ordered.numel() else torch.inf
    limits = torch.where(misses > 0, limit / misses, torch.inf if limit > 0 else 0.0)
    limits = torch.where(misses.isinf(), 0.0, limits).float()
    return limits, float((costs < limit).double().mean())


def choose_stand_ins(program: Program, layer: Layer, stats: LayerStats, by: str) -> list[StandIn]:
    """For each expert, the replacement with the smallest error among the kinds that `by` allows."""
    allowed = ("zero", "copy", "constant") if by == "best" else (by,)
    result_of, chosen = expert_results(program, layer), []
    for e in range(layer.count):
        x = widened(stats.x[(stats.experts == e).any(-1)][:ROWS])
        if not len(x):
            chosen.append(StandIn(allowed[0], torch.zeros(x.shape[1]), torch.inf))
            continue
        y = result_of(e, x).float()
        mean = y.mean(0)
        guesses = {"zero": torch.zeros_like(mean), "copy": x, "constant": mean}
        left = {kind: float((y - guesses[kind]).square().sum(-1).mean().sqrt()) for kind in allowed}
        best = min(left, key=lambda kind: left[kind])
        chosen.append(StandIn(best, mean, left[best]))
    return chosen


def expert_results(program: Program, layer: Layer) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """What an expert returns for rows [N, D], in float32 (of float64 in float64)."""
    body = layer.experts.body
    assert body is not None
    stacks = [widened(constant(program, stack)) for stack in layer.stacks]
    (rows,) = symbols(body.inputs[0].shape[0])
    wide = widen(body)

    def result_of(e: int, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return run_graph(wide, [widened(x), *(s[e] for s in stacks)], {rows: len(x)})[0]

    return result_of


def _redirect_choices(
    splice: Splice, layer: Layer, limits: torch.Tensor, table: torch.Tensor
) -> None:
    """Gives choices whose weight is below the limit the id of their expert's replacement."""
    route = layer.route
    weights, ids = route.outputs
    chosen = splice.value(ids.name, ids.type)
    ops = [replace(route, outputs=(weights, chosen))]

    def looked_up(name: str, values: torch.Tensor, dtype: str) -> Value:
        param = splice.weight(f"{layer.name}.{name}", values)
        type, attrs = TensorType(dtype, ids.shape), {"indices": (Ref(1),)}
        return splice.emit(ops, "aten.index.Tensor", (param, chosen), type, route, **attrs)

    wide = splice.cast(ops, weights, "f32", route)
    limit = looked_up("limits", limits, "f32")
    flag = TensorType("bool", ids.shape)
    small = splice.emit(ops, "aten.lt.Tensor", (wide, limit), flag, route)
    other = looked_up("instead", table, "i64")
    inputs = (small, other, chosen)
    ops.append(Op("aten.where.self", inputs, (ids,), {}, None, route.origin))
    splice.put(route, ops)
