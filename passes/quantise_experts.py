"""The weights of experts become numbers of few bits: opt-in, and approximate.

    h = grouped.linear(x, ends, gate, up, order)      h = grouped.quantised(x, ends,
                                                            gate.codes, gate.scales,
      gate: f32[E, H, D]                       ->           up.codes, up.scales, order)
      up:   f32[E, H, D]                                gate.codes: u8[E, H, D]
                                                        gate.scales: bf16[E, H, D/block]

Experts are where the bytes of an MoE model are, and decoding reads each chosen one whole: int8
halves and int4 quarters what bf16 reads. Codes are rounded to nearest, whole stacks at once, so
an expert is quantised with all others or not at all. Routers, norms and the head stay as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir import Attr, Op, Program, Stage, TensorType, Value
from moec.ops.grouped import GroupedLinear
from moec.passes.rewrite import Builder, rewrite
from moec.passes.runner import Log
from moec.quantisation import Format, quantise

WIDE = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class QuantiseExperts:
    """Store the weights of experts in few bits, as --quant asks."""

    format: Format
    name: ClassVar[str] = "quantise-experts"
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED
    exact: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    def run(self, program: Program, log: Log) -> Program:
        made: dict[str, torch.Tensor] = {}
        known: dict[Value, tuple[Value, ...]] = {}

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            if op.name != "grouped.linear":
                return None
            return _quantised(op, b, self.format, program, made, known)

        graph = rewrite(program.graph, rule, log)
        kept = {p.name for p in graph.params} | {s.before.name for s in graph.states}
        weights = {n: t for n, t in {**program.weights, **made}.items() if n in kept}
        return Program(graph, weights)


def _quantised(
    op: Op,
    b: Builder,
    format: Format,
    program: Program,
    made: dict[str, torch.Tensor],
    known: dict[Value, tuple[Value, ...]],
) -> tuple[Value, ...]:
    parts = GroupedLinear.of(op)
    _check(parts, format, program)
    values: list[Value] = []
    for matrix in parts.matrices:
        if matrix not in known:
            known[matrix] = _params(matrix, b, format, program, made)
        values += known[matrix]
    attrs: dict[str, Attr] = {**op.attrs, "kind": format.kind}
    if format.asymmetric:
        attrs["zeros"] = True
    more = [v for v in (parts.order, parts.scale) if v is not None]
    inputs = [parts.x, parts.ends, *values, *parts.biases, *more]
    return b.emit("grouped.quantised", inputs, like=op, attrs=attrs, body=op.body)


def _check(parts: GroupedLinear, format: Format, program: Program) -> None:
    for matrix in parts.matrices:
        weight, width = program.weights.get(matrix.name), matrix.shape[-1]
        if weight is None:
            raise NoMatch(f"the weights {matrix.name} are computed while the model runs")
        if matrix.dtype not in WIDE or parts.x.dtype not in WIDE:
            raise NoMatch(f"the weights {matrix} are not of {', '.join(WIDE)}")
        if matrix.shape != parts.matrices[0].shape:
            raise NoMatch(f"the weights {matrix.name} and {parts.matrices[0].name} differ in shape")
        if not isinstance(width, int) or (format.block and width % format.block):
            raise NoMatch(f"blocks of {format.block} do not divide the {width} weights of a row")
        if not all(bool(torch.isfinite(expert).all()) for expert in weight):
            raise NoMatch(f"the weights {matrix.name} hold an infinity or a NaN")


def _params(
    matrix: Value, b: Builder, format: Format, program: Program, made: dict[str, torch.Tensor]
) -> tuple[Value, ...]:
    """New params with the codes, scales and zeros of a stack of weights."""
    found = quantise(format, program.weights[matrix.name])
    scales = TensorType(format.scale_dtype, (*matrix.shape[:-1], found.scales.shape[-1]))
    values = [
        b.param(f"{matrix.name}.codes", TensorType("u8", matrix.shape)),
        b.param(f"{matrix.name}.scales", scales),
    ]
    tensors = [found.codes, found.scales]
    if found.zeros is not None:
        values.append(b.param(f"{matrix.name}.zeros", TensorType("u8", scales.shape)))
        tensors.append(found.zeros)
    made |= {value.name: tensor for value, tensor in zip(values, tensors, strict=True)}
    return tuple(values)
