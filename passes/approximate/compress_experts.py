"""The weights of experts become ternary, or numbers of two bits, fitted to what experts see.

                                           w = moe.decompress(w1.stream, w1.starts, w1.grid)
    out = moe.experts(rows, ends, w1)  ->  out = moe.experts(rows, ends, w)

      w1: bf16[E, H, D], 16 bits a weight    w1.stream: i16[W], some 0.8 bits a weight
                                             w1.starts: u8[E*H/32, 36], w1.grid: bf16[E, H, 2]

Each linear layer of an expert is solved on the rows that the router sends it (GPTQ). Where it reads
what compressed layers before it make, it aims at what the original made of the original's, and so
mends some of their errors. Least squares then fit the two numbers of each row to its codes, and
codes and numbers take turns until none of them helps any more
(passes/calibration/coordinate_descent.py). Experts are solved 16 at a time. No expert counts more
rows than four times the mean, so that a favourite does not hold up the rest; one that saw none has
nothing to be solved on, and is rounded to nearest.
Routers, norms, biases and the head stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.formats.compressed import KINDS, MOST_WIDTH, PARTS, compress, grid_module, nbytes
from moec.interpret.evaluate import run_graph
from moec.ir.graph import DType, Graph, Op, Program, TensorType, Value
from moec.ir.upcast import widen
from moec.passes.calibration.coordinate_descent import ROUNDS, descend
from moec.passes.calibration.evaluator import Seen
from moec.passes.calibration.gptq import DAMPING, aimed, damped, hessian, solve_ordered
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer, Splice, constant
from moec.passes.core.options import option, validate
from moec.passes.core.rewrite import drop_dead

GROUP = 16
"""Experts that are solved at a time."""
REACHES = (1.0, 0.9, 0.8, 0.7)
"""Shares of the grid that rows of two bits are tried with: they all take the same bits."""
MOST_ROWS = 4
"""Times the mean number of rows that an expert counts at most."""
WIDE = ("f32", "bf16", "f16")

Stacks = dict[Value, torch.Tensor]
Weights = Sequence[Sequence[torch.Tensor]]
"""Of each expert, in the order of the body's params."""


@dataclass(frozen=True)
class CompressExperts:
    """Store experts in under one bit a weight (ternary, with a dictionary) or in two."""

    kind: str = option(
        "ternary",
        "0 and the least and greatest weight of a row, in codewords of a dictionary (ternary), or "
        "four levels a row (2bit)",
        choices=KINDS,
    )
    by: str = option(
        "gptq",
        "weights are fitted to the results on the calibration data (gptq), or each is rounded by "
        "itself (nearest)",
        choices=("gptq", "nearest"),
    )
    damping: float = option(
        DAMPING, "share of the mean of the Hessian's diagonal that is added to it", low=0, high=1
    )
    reach: float = option(
        1.0,
        "share of a row's least and greatest weight that ternary numbers start from: with less, "
        "fewer weights are 0, which takes more bits and loses less",
        low=0.1,
        high=1,
    )
    rounds: int = option(ROUNDS, "of descent over the codes after GPTQ, at most", low=0)
    name: ClassVar[str] = "compress-experts"
    source: ClassVar[str] = (
        "format, ternary grid: arXiv 2310.16795; GPTQ: arXiv 2210.17323; descent: arXiv 2309.01885"
    )

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, seen: Seen) -> Change:
        body = layer.experts.body
        assert body is not None
        stacks = dict(zip(body.params, layer.stacks, strict=True))
        linears = _linears(body)
        before = {param: _weights(program, stack) for param, stack in stacks.items()}
        for _, param in linears:
            _check(stacks[param], before[param])
        rows = [] if self.by == "nearest" else _rows(layer, seen)
        codes, grids, unseen = self._solve(widen(body), body, linears, before, rows)
        splice = Splice(program)
        ops: list[Op] = []
        made: dict[Value, Value] = {}
        stored = zeros = weights = 0
        for param, own in codes.items():
            stack = stacks[param]
            parts = compress(self.kind, own, grids[param])
            values = [
                splice.weight(f"{stack.name}.{part}", tensor)
                for part, tensor in zip(PARTS[self.kind], parts, strict=True)
            ]
            width, type = own.shape[-1], TensorType(stack.dtype, stack.shape)
            made[stack] = splice.emit(
                ops, "moe.decompress", values, type, layer.experts,
                kind=self.kind, width=width, dtype=DType(stack.dtype),
            )  # fmt: skip
            stored += nbytes(parts)
            zeros += int((own == 0).sum())
            weights += own.numel()
        inputs = tuple(made.get(v, v) for v in layer.experts.inputs)
        splice.put(layer.experts, [*ops, replace(layer.experts, inputs=inputs)])
        says = f"{self.kind}, {8 * stored / weights:.3f} bits a weight"
        if self.kind == "ternary":
            says += f", {zeros / weights:.1%} zeros"
        if unseen and self.by == "gptq":
            says += f"; no rows for {', '.join(map(str, unseen))}, rounded to nearest"
        members = tuple((expert,) for expert in range(layer.count))
        return Change(splice.done(), members, says)

    def _solve(
        self,
        body: Graph,
        own: Graph,
        linears: Sequence[tuple[Op, Value]],
        before: Mapping[Value, torch.Tensor],
        rows: Sequence[torch.Tensor],
    ) -> tuple[Stacks, Stacks, list[int]]:
        """The codes and grids of the linear layers' stacks, and the experts that saw no rows.

        `body` is `own` in float32.
        """
        module = grid_module(self.kind)
        grids = {param: module.grid_of(before[param]) for _, param in linears}
        codes = {param: torch.empty(before[param].shape, dtype=torch.uint8) for _, param in linears}
        if not rows:
            for param, into in codes.items():
                for e, matrix in enumerate(before[param]):
                    into[e] = module.codes_of(matrix.float(), grids[param][e])
            return codes, grids, []
        reads = {op.outputs[0].name: op.inputs[0] for op in body.ops}
        for start in range(0, len(rows), GROUP):
            group = range(start, min(start + GROUP, len(rows)))
            original = [[before[p][e].float() for p in own.params] for e in group]
            now = [list(some) for some in original]
            moments: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
            for op, param in linears:
                source = reads[op.outputs[0].name]
                if source not in moments:
                    to_here = drop_dead(replace(body, outputs=(source,)))
                    moments[source] = _moments(
                        to_here, body, rows[start : group.stop], original, now
                    )
                second, cross = moments[source]
                place = own.params.index(param)
                wanted = torch.stack([some[place] for some in original])
                if cross is not second:
                    wanted = aimed(wanted, cross, second, self.damping)
                found, grid = self._fitted(module, wanted, grids[param][list(group)], second)
                codes[param][list(group)], grids[param][list(group)] = found, grid
                for some, matrix in zip(now, module.values(found, grid), strict=True):
                    some[place] = matrix
        return codes, grids, [e for e, own_rows in enumerate(rows) if not len(own_rows)]

    def _fitted(
        self, module: ModuleType, wanted: torch.Tensor, grid: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and numbers for the weights `wanted` [E, N, K] of some experts: each row's best of
        those that start from shares of its grid. An expert without rows keeps the whole one."""
        known = damped(second, self.damping)
        unseen = (second.diagonal(dim1=-2, dim2=-1).sum(-1) == 0)[:, None, None]
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        least = torch.zeros(())
        for reach in REACHES if self.kind == "2bit" else (self.reach,):
            start = torch.where(unseen, grid, module.shrunk(grid, reach))
            nearest = partial(_nearest, module, start)
            solved = solve_ordered(wanted, second, nearest, self.damping).weight
            codes = module.codes_of(solved, start)
            fitted = module.refit(wanted, codes, start, known)
            made = descend(module, wanted, codes, fitted, known, self.rounds)
            off = module.values(*made) - wanted
            lost = ((off @ known) * off).sum(-1)
            less = torch.ones_like(lost, dtype=torch.bool) if best is None else lost < least
            before = best or made
            codes, fitted = (
                torch.where(less[..., None], new, old)
                for new, old in zip(made, before, strict=True)
            )
            best, least = (codes, fitted), torch.where(less, lost, least)
        assert best is not None
        return best


def _nearest(module: ModuleType, grid: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    column = column[..., None]
    made: torch.Tensor = module.values(module.codes_of(column, grid), grid)
    return made[..., 0]


def _moments(
    to_here: Graph, body: Graph, rows: Sequence[torch.Tensor], original: Weights, now: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what `to_here` gives with the weights as they are `now`, X', for each expert X' X'^T, and
    X X'^T with the `original` ones: f32[E, K, K] each, one tensor where no weight is read."""
    seconds, crosses = [], []
    for own, was, weights in zip(rows, original, now, strict=True):
        entering = _run(to_here, body, own, weights)
        seconds.append(hessian(entering))
        if to_here.params:
            crosses.append(_run(to_here, body, own, was).mT @ entering)
    second = torch.stack(seconds)
    return second, torch.stack(crosses) if crosses else second


def _run(
    to_here: Graph, body: Graph, rows: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What enters a layer of the body: `to_here` computes it and reads some of the weights."""
    known = dict(zip(body.params, weights, strict=True))
    with torch.no_grad():
        return run_graph(to_here, [rows, *(known[p] for p in to_here.params)])[0]


def _linears(body: Graph) -> list[tuple[Op, Value]]:
    """The linear layers of a body with the params that are their weights. Raises NoMatch where
    there are none, or where a weight is used for something else too."""
    found = [
        (op, op.inputs[1])
        for op in body.ops
        if op.name == "aten.linear.default" and op.inputs[1] in body.params
    ]
    if not found:
        raise NoMatch("the experts hold no linear layer with a weight of their own")
    for op in body.ops:
        if op.name == "aten.linear.default" and op.inputs[1] not in body.params:
            raise NoMatch(f"the experts' weight {op.inputs[1].name} is computed from others")
    for op, weight in found:
        if list(body.readers[weight]) != [op]:
            raise NoMatch(f"the experts' weight {weight.name} is read more than once")
        if op.inputs[0] in body.params:
            raise NoMatch(f"the experts' weight {weight.name} does not multiply rows")
    return found


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
    if not all(bool(torch.isfinite(expert).all()) for expert in weight):
        raise NoMatch(f"the weights {stack.name} hold an infinity or a NaN")


def _rows(layer: Layer, seen: Seen) -> list[torch.Tensor]:
    """The rows [R, D] that each expert is solved on."""
    scaled = len(layer.dispatch.inputs) > 2
    tokens, slots = seen.experts.shape
    most = max(1, MOST_ROWS * tokens * slots // layer.count)
    rows = []
    for e in range(layer.count):
        token, slot = (where[:most] for where in torch.where(seen.experts == e))
        own = seen.x[token].float()
        rows.append(own * seen.weights[token, slot, None] if scaled else own)
    return rows
