"""Codes that GPTQ chooses on calibration data, so that the error of a layer's results is small.

Scales are those of rounding to nearest. Codes are computed by GPTQ (passes/calibration/gptq.py) for
each expert from its own rows; an expert with too few rows is rounded to nearest, and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from moec.errors import NoMatch
from moec.formats.integer import Quantised, dequantise, encode, quantise, rounded
from moec.formats.notation import Format
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Op, Program, Stage, Value
from moec.ops.experts.grouped import GroupedLinear
from moec.passes.calibration.data import Calibration, load_calibration
from moec.passes.calibration.gptq import (
    Factored,
    factorise,
    hessian,
    solve_factored,
    squared_results,
)
from moec.passes.core.rewrite import drop_dead
from moec.passes.core.rounding_stats import FEWEST, RoundingStats
from moec.passes.core.runner import Kind, Log, Pass
from moec.passes.quantise.codes import Codes, QuantisingPass, part_name, stack_of

DAMPING = 0.01
"""Damping of the Hessian, the value that GPTQ uses for four bits and more."""
HELD = 256 << 20
"""Bytes of Hessians that are worked on at once."""
OPS_A_RUN = 8
"""Ops whose rows are held at once, at least."""
ROWS_HELD = 1 << 30
"""Bytes of rows that are held at once, where they are of more ops."""


@dataclass(frozen=True, eq=False)
class CalibratedQuantisation(Pass):
    """A pass that quantises, with codes chosen on calibration data: `calib` as `moec.compile`
    takes it, `files` of the model's source."""

    inner: QuantisingPass
    calib: Any
    files: Mapping[str, bytes]
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED
    kind: ClassVar[Kind] = Kind.QUANTISES

    @property
    def name(self) -> str:
        return self.inner.name

    def run(self, program: Program, log: Log) -> Program:
        codes = Codes(program, log.memory)
        targets = [(op, format) for op, format in self.inner.targets(program.graph)]
        data = load_calibration(self.calib, program, self.files)
        for (op, format), rows in zip(
            targets, rows_of(program, data, [op for op, _ in targets]), strict=True
        ):
            for part, experts in self.inner.parts(op, format):
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


def rows_of(program: Program, data: Calibration, ops: Sequence[Op]) -> Iterator[list[Tensor]]:
    """For each op, a linear layer or experts, the input rows [R, K] of each expert."""
    states = [program.weights[s.before.name] for s in program.graph.states]
    start, each = 0, OPS_A_RUN
    while group := ops[start : start + each]:
        start += each
        probes = tuple(dict.fromkeys(v for op in group for v in _read(op)))
        graph = drop_dead(replace(program.graph, outputs=probes, states=()))
        cases: list[dict[Value, Tensor]] = []
        for case in data.cases:
            with torch.no_grad():
                results = evaluate(graph, [*case, *states], program.weights)
            cases.append(dict(zip(probes, results, strict=True)))
        size = sum(rows.nbytes for case in cases for rows in case.values())
        each = max(OPS_A_RUN, int(len(group) * ROWS_HELD / max(1, size)))
        for op in group:
            yield _rows(op, cases)


def _read(op: Op) -> list[Value]:
    if op.name != "grouped.linear":
        return [op.inputs[0]]
    parts = GroupedLinear.of(op)
    return [v for v in (parts.x, parts.ends, parts.order) if v is not None]


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
            full = weight[part].float()
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

    by_column = [None if t is None else t.float().mT.contiguous() for t in (scales, zeros)]
    integers = not format.float_zeros and format.kind not in ("fp8", "mxfp4")

    def grid(column: Tensor, k: int) -> Tensor:
        at = k // format.block if format.block else 0
        if integers:
            return rounded(format.bits, column, *(t if t is None else t[:, at] for t in by_column))
        scale = scales[..., at : at + 1]
        zero = None if zeros is None else zeros[..., at : at + 1]
        codes = encode(format, column[..., None], scale, zero)
        return dequantise(format.kind, codes, scale, zero)[..., 0]

    values = solve_factored(full, factored, grid).weight.contiguous()
    values[few] = nearest[few]
    base.codes[part] = encode(format, values, scales, zeros)
    return nearest, values
