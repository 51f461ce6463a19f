"""Codes that GPTQ chooses on calibration data, so that the error of a layer's results is small.

Scales are those of rounding to nearest. Codes are computed by GPTQ (passes/calibration/gptq.py) for
each expert from its own rows; an expert with too few rows is rounded to nearest, and reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from moec.errors import NoMatch
from moec.ir.formats.integer import Quantised, dequantise, encode, quantise, rounded
from moec.ir.formats.notation import Format
from moec.ir.graph import Op, Program, Value
from moec.ir.interpret.evaluate import bind_checked, run_part
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.calibration.data import Calibration, load_calibration
from moec.passes.calibration.gptq import (
    Factored,
    factorise,
    hessian,
    solve_factored,
    squared_results,
)
from moec.passes.core.damage import FEWEST, RoundingStats
from moec.passes.core.rewrite import drop_dead
from moec.passes.core.runner import Kind, Log, Pass
from moec.passes.quantise.codes import Codes, QuantisingPass, part_name, stack_of

DAMPING = 0.01
"""Damping of the Hessian, the value that GPTQ uses for four bits and more."""
HELD = 256 << 20
"""Bytes of Hessians that are worked on at once."""


@dataclass(frozen=True, eq=False)
class CalibratedQuantisation(Pass):
    """A pass that quantises, with codes chosen on calibration data: `calib` as `moec.compile`
    takes it, `files` of the model's source."""

    inner: QuantisingPass
    calib: Any
    files: Mapping[str, bytes]
    kind: ClassVar[Kind] = Kind.QUANTISES

    @property
    def name(self) -> str:
        return self.inner.name

    def run(self, program: Program, log: Log) -> Program:
        codes = Codes(program, log.memory)
        formats = dict(self.inner.targets(program.graph))
        data = load_calibration(self.calib, program, self.files)
        for op, rows in rows_of(program, data, formats):
            for part, experts in self.inner.parts(op, formats[op]):
                fitting = [m for m in stored(op) if _fits(codes, m, part)]
                weights = {
                    part_name(m.name, part, experts): stack_of(program.weights[m.name], experts)
                    for m in fitting
                }
                some_rows = [rows[e] for e in experts] or rows
                solved = calibrate(part, weights, some_rows)
                for matrix, (quantised, fit) in zip(fitting, solved, strict=True):
                    codes.calibrated[matrix.name, part, experts] = quantised
                    log.fits.append(replace(fit, experts=experts))
        return self.inner.rounded(program, log, codes)


def _fits(codes: Codes, matrix: Value, format: Format) -> bool:
    try:
        codes.check(matrix, format)
    except NoMatch:  # `rounded` logs the reason
        return False
    return True


def stored(op: Op) -> tuple[Value, ...]:
    """The weights of a linear layer or of experts."""
    return GroupedLinear.of(op).matrices if op.name == "grouped.linear" else op.inputs[1:2]


def rows_of(
    program: Program, data: Calibration, ops: Collection[Op]
) -> Iterator[tuple[Op, list[Tensor]]]:
    """Of `ops`, linear layers or experts, in the order of the graph, each with the input rows
    [R, K] of each expert. All cases run up to an op before any goes on."""
    if not ops:
        return
    states = [program.weights[s.before.name] for s in program.graph.states]
    outputs = tuple(value for op in ops for value in op.outputs)
    graph = drop_dead(replace(program.graph, outputs=outputs, states=()))
    graph = replace(graph, outputs=graph.ops[-1].outputs)  # others are dropped when they were read
    sizes: list[dict[str, int]] = [{} for _ in data.cases]
    cases = [
        bind_checked(graph, [*case, *states], program.weights, each)
        for case, each in zip(data.cases, sizes, strict=True)
    ]
    start = 0
    for stop in (i for i, op in enumerate(graph.ops) if op in ops):
        with torch.no_grad():  # left before the caller goes on
            for values, each in zip(cases, sizes, strict=True):
                run_part(graph, range(start, stop), values, each)
        start = stop
        yield graph.ops[stop], _rows(graph.ops[stop], cases)


def _rows(op: Op, cases: Sequence[dict[Value, Tensor]]) -> list[Tensor]:
    if op.name != "grouped.linear":
        return [torch.cat([_flat(case[op.inputs[0]]) for case in cases])]
    parts, k = GroupedLinear.of(op), op.attrs.get("gather", 1)
    assert isinstance(k, int)
    each: list[list[Tensor]] = []
    for case in cases:
        x, ends = case[parts.x], case[parts.ends].tolist()
        if parts.order is not None:
            x = x[case[parts.order].long() // k]
        each.append([x[first:end] for first, end in pairwise([0, *ends])])
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def calibrate(
    format: Format, weights: Mapping[str, Tensor], rows: Sequence[Tensor]
) -> list[tuple[Quantised, RoundingStats]]:
    """Codes for named weights [E, N, K] that multiply the same input rows [R, K] of each expert."""
    bases = [quantise(format, weight) for weight in weights.values()]
    errors = torch.zeros(len(weights), 3, dtype=torch.float64)
    width = rows[0].shape[-1]
    each = max(1, HELD // (4 * width * width))
    for start in range(0, len(rows), each):
        part = slice(start, start + each)
        hessians = torch.stack([hessian(expert_rows) for expert_rows in rows[part]])
        factored = factorise(hessians, DAMPING)
        few = torch.tensor([len(expert_rows) < FEWEST for expert_rows in rows[part]])
        for base, weight, total in zip(bases, weights.values(), errors, strict=True):
            full = weight[part].detach().float()
            nearest, values = _solved(format, base, part, full, factored, few)
            for i, off in enumerate((nearest.sub_(full), values.sub_(full), full)):
                total[i] += squared_results(off, hessians)
    counts = tuple(map(len, rows))
    stats = []
    for name, (off, solved, norm) in zip(weights, errors.tolist(), strict=True):
        share = (norm or 1.0) ** -0.5
        stats.append(RoundingStats(name, counts, off**0.5 * share, solved**0.5 * share))
    return list(zip(bases, stats, strict=True))


def _solved(
    format: Format, base: Quantised, part: slice, full: Tensor, factored: Factored, few: Tensor
) -> tuple[Tensor, Tensor]:
    """Some experts' weights rounded to nearest, and by GPTQ, whose codes become those of `base`;
    experts with `few` rows are rounded to nearest."""
    scales, zeros = base.scales[part], None if base.zeros is None else base.zeros[part]
    nearest = dequantise(format.kind, base.codes[part], scales, zeros)

    steps = scales.float().mT.contiguous()
    offsets = None if zeros is None else zeros.float().mT.contiguous()
    integers = not format.float_zeros and format.kind not in ("fp8", "mxfp4")

    def grid(column: Tensor, k: int) -> Tensor:
        at = k // format.block if format.block else 0
        if integers:
            offset = None if offsets is None else offsets[:, at]
            return rounded(format.bits, column, steps[:, at], offset)
        scale = scales[..., at : at + 1]
        zero = None if zeros is None else zeros[..., at : at + 1]
        codes = encode(format, column[..., None], scale, zero)
        return dequantise(format.kind, codes, scale, zero)[..., 0]

    values = solve_factored(full, factored, grid).weight.contiguous()
    values[few] = nearest[few]
    base.codes[part] = encode(format, values, scales, zeros)
    return nearest, values
