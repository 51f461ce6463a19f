"""The weights of experts become ternary, fitted to calibration rows.

                                           w = moe.decompress(w1.stream, w1.starts, w1.grid)
    out = moe.experts(rows, ends, w1)  ->  out = moe.experts(rows, ends, w)

      w1: bf16[E, H, D], 16 bits a weight    w1.stream: i16[W], some 0.8 bits a weight
                                             w1.starts: u8[E*H/32, 36], w1.grid: bf16[E, H, 2]

Each linear layer of an expert is solved on the rows that the router sends it (GPTQ). A layer that
reads results of compressed layers is fitted to the original layer's results on original inputs, and
so corrects some of their errors. Least squares then fit the two numbers of each row to its codes;
codes and numbers are improved in turns until neither step helps
(passes/calibration/coordinate_descent.py). Experts are solved 16 at a time. At most four times the
mean number of rows is used of an expert, which limits the time of a popular one; an expert without
rows is rounded to nearest.
Routers, norms, biases and the head stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from moec.dtypes import VECTOR_DTYPES
from moec.errors import NoMatch
from moec.ir.formats import ternary
from moec.ir.formats.compressed import KIND, MOST_WIDTH, PARTS, compress, nbytes
from moec.ir.graph import DType, Graph, Op, Program, TensorType, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.upcast import widen
from moec.passes.calibration.coordinate_descent import ROUNDS, descend
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.calibration.gptq import DAMPING, damp, hessian, retarget, solve_ordered
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer, Splice, constant
from moec.passes.core.options import option, validate
from moec.passes.core.rewrite import drop_dead

GROUP = 16
"""How many experts are solved at a time."""
MOST_ROWS = 4
"""The most rows of an expert that are used, as a multiple of the mean."""
WIDE = VECTOR_DTYPES

Stacks = dict[Value, torch.Tensor]
Weights = Sequence[Sequence[torch.Tensor]]
"""The weights of each expert, in the order of the body's params."""


@dataclass(frozen=True)
class CompressExperts:
    """Store experts in under one bit a weight: three values per row, with a dictionary."""

    by: str = option(
        "gptq",
        "weights are fitted to the outputs on the calibration data (gptq), or each is rounded on "
        "its own (nearest)",
        choices=("gptq", "nearest"),
    )
    damping: float = option(
        DAMPING,
        "damping: share of the mean of the Hessian's diagonal that is added to it",
        low=0,
        high=1,
    )
    reach: float = option(
        1.0,
        "initial values, as a share of a row's least and greatest weight: with less, "
        "fewer weights are 0, which needs more bits and loses less",
        low=0.1,
        high=1,
    )
    rounds: int = option(
        ROUNDS, "greatest number of sweeps of coordinate descent over the codes after GPTQ", low=0
    )
    name: ClassVar[str] = "compress-experts"
    source: ClassVar[str] = (
        "format, ternary grid: arXiv 2310.16795; GPTQ: arXiv 2210.17323; descent: arXiv 2309.01885"
    )

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        body = layer.experts.body
        assert body is not None
        stacks = dict(zip(body.params, layer.stacks, strict=True))
        linears = _linears(body)
        before = {param: _weights(program, stack) for param, stack in stacks.items()}
        for _, param in linears:
            _check(stacks[param], before[param])
        rows = [] if self.by == "nearest" else rows_of_experts(layer, stats)
        codes, grids, unseen = self._solve(widen(body), body, linears, before, rows)
        splice = Splice(program)
        ops: list[Op] = []
        decompressed: dict[Value, Value] = {}
        stored = zeros = weights = 0
        for param, stack_codes in codes.items():
            stack = stacks[param]
            parts = compress(stack_codes, grids[param])
            values = [
                splice.weight(f"{stack.name}.{part}", tensor)
                for part, tensor in zip(PARTS, parts, strict=True)
            ]
            width, type = stack_codes.shape[-1], TensorType(stack.dtype, stack.shape)
            decompressed[stack] = splice.emit(
                ops, "moe.decompress", values, type, layer.experts,
                kind=KIND, width=width, dtype=DType(stack.dtype),
            )  # fmt: skip
            stored += nbytes(parts)
            zeros += int((stack_codes == 0).sum())
            weights += stack_codes.numel()
        inputs = tuple(decompressed.get(v, v) for v in layer.experts.inputs)
        splice.put(layer.experts, [*ops, replace(layer.experts, inputs=inputs)])
        bits = 8 * stored / weights
        says = f"{KIND}, {bits:.3f} bits a weight, {zeros / weights:.1%} zeros"
        if unseen and self.by == "gptq":
            says += f"; no rows for {', '.join(map(str, unseen))}, rounded to nearest"
        members = tuple((expert,) for expert in range(layer.count))
        return Change(splice.done(), members, says)

    def _solve(
        self,
        body: Graph,
        stored_body: Graph,
        linears: Sequence[tuple[Op, Value]],
        before: Mapping[Value, torch.Tensor],
        rows: Sequence[torch.Tensor],
    ) -> tuple[Stacks, Stacks, list[int]]:
        """The codes and grids of the linear layers' stacks, and the experts that saw no rows.

        `body` is `stored_body` in float32. Codes are u8[E, N, K], grids [E, N, 2].
        """
        grids = {param: ternary.grid_of(before[param]) for _, param in linears}
        codes = {param: torch.empty(before[param].shape, dtype=torch.uint8) for _, param in linears}
        if not rows:
            for param, into in codes.items():
                for e, matrix in enumerate(before[param]):
                    into[e] = ternary.codes_of(matrix.float(), grids[param][e])
            return codes, grids, []
        reads = {op.outputs[0].name: op.inputs[0] for op in body.ops}
        for start in range(0, len(rows), GROUP):
            group = range(start, min(start + GROUP, len(rows)))
            original = [[before[p][e].float() for p in stored_body.params] for e in group]
            now = [list(matrices) for matrices in original]
            moments: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
            for op, param in linears:
                source = reads[op.outputs[0].name]
                if source not in moments:
                    to_here = drop_dead(replace(body, outputs=(source,)))
                    moments[source] = _moments(
                        to_here, body, rows[start : group.stop], original, now
                    )
                second, cross = moments[source]
                position = stored_body.params.index(param)
                target = torch.stack([matrices[position] for matrices in original])
                if cross is not second:
                    target = retarget(target, cross, second, self.damping)
                fitted_codes, grid = self._fitted(target, grids[param][list(group)], second)
                codes[param][list(group)], grids[param][list(group)] = fitted_codes, grid
                for matrices, matrix in zip(now, ternary.values(fitted_codes, grid), strict=True):
                    matrices[position] = matrix
        return codes, grids, [e for e, own_rows in enumerate(rows) if not len(own_rows)]

    def _fitted(
        self, target: torch.Tensor, grid: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes u8[E, N, K] and grids [E, N, 2] for the weights `target` [E, N, K] of a group.

        An expert without rows has its full grid. `second` is the Hessian, f32[E, K, K].
        """
        damped_hessian = damp(second, self.damping)
        unseen = (second.diagonal(dim1=-2, dim2=-1).sum(-1) == 0)[:, None, None]
        start = torch.where(unseen, grid, ternary.scale_grid(grid, self.reach))
        nearest = partial(_round_to_grid, start)
        solved = solve_ordered(target, second, nearest, self.damping).weight
        codes = ternary.codes_of(solved, start)
        fitted = ternary.refit(target, codes, start, damped_hessian)
        return descend(target, codes, fitted, damped_hessian, self.rounds)


def _round_to_grid(grid: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    column = column[..., None]
    return ternary.values(ternary.codes_of(column, grid), grid)[..., 0]


def _moments(
    to_here: Graph, body: Graph, rows: Sequence[torch.Tensor], original: Weights, now: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """X' X'^T and X X'^T of each expert: f32[E, K, K] each.

    X' is the result of `to_here` with the weights `now`, X that with the `original` weights. Both
    are one tensor where `to_here` reads no weight.
    """
    seconds, crosses = [], []
    for expert_rows, was, weights in zip(rows, original, now, strict=True):
        entering = _run(to_here, body, expert_rows, weights)
        seconds.append(hessian(entering))
        if to_here.params:
            crosses.append(_run(to_here, body, expert_rows, was).mT @ entering)
    second = torch.stack(seconds)
    return second, torch.stack(crosses) if crosses else second


def _run(
    to_here: Graph, body: Graph, rows: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The input of a layer of the body, which `to_here` computes from rows and some weights."""
    by_param = dict(zip(body.params, weights, strict=True))
    with torch.no_grad():
        return run_graph(to_here, [rows, *(by_param[p] for p in to_here.params)])[0]


def _linears(body: Graph) -> list[tuple[Op, Value]]:
    """The linear layers of a body with the params that are their weights. Raises NoMatch if
    there are none, or where a weight is used for something else too."""
    linears = [
        (op, op.inputs[1])
        for op in body.ops
        if op.name == "aten.linear.default" and op.inputs[1] in body.params
    ]
    if not linears:
        raise NoMatch("the experts hold no linear layer with a weight of their own")
    for op in body.ops:
        if op.name == "aten.linear.default" and op.inputs[1] not in body.params:
            raise NoMatch(f"the experts' weight {op.inputs[1].name} is computed from others")
    for op, weight in linears:
        if list(body.readers[weight]) != [op]:
            raise NoMatch(f"the experts' weight {weight.name} is read more than once")
        if op.inputs[0] in body.params:
            raise NoMatch(f"the experts' weight {weight.name} does not multiply rows")
    return linears


def _weights(program: Program, stack: Value) -> torch.Tensor:
    source = program.graph.producers.get(stack)
    if source is not None and source.name == "moe.decompress":
        raise NoMatch(f"the weights {stack.name} are compressed already")
    return constant(program, stack)


def _check(stack: Value, weight: torch.Tensor) -> None:
    if stack.dtype not in WIDE:
        raise NoMatch(f"the weights {stack} are not of {', '.join(WIDE)}")
    if not 1 <= weight.shape[-1] <= MOST_WIDTH:
        raise NoMatch(f"rows of the weights {stack} are not 1 to {MOST_WIDTH} wide")
    if not all(bool(torch.stack(expert.aminmax()).isfinite().all()) for expert in weight):
        raise NoMatch(f"the weights {stack.name} hold an infinity or a NaN")


def rows_of_experts(layer: Layer, stats: LayerStats) -> list[torch.Tensor]:
    """The rows [R, D] that each expert is solved on."""
    scaled = len(layer.dispatch.inputs) > 2
    tokens, slots = stats.experts.shape
    most = max(1, MOST_ROWS * tokens * slots // layer.count)
    rows = []
    for e in range(layer.count):
        token, slot = (where[:most] for where in torch.where(stats.experts == e))
        expert_rows = stats.x[token].float()
        rows.append(expert_rows * stats.weights[token, slot, None] if scaled else expert_rows)
    return rows
