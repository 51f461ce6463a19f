"""nn.quantised_linear: a linear layer with weights of few bits, and rows of 8 or 16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moec.ir.formats.integer import dequantise, round_rows
from moec.ir.formats.notation import Format
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, require, tensors_of
from moec.ir.ops.experts.mixed import GroupedMixed
from moec.ir.ops.experts.quantised import GroupedQuantised, Matrix, format_of


@dataclass(frozen=True)
class QuantisedLinear:
    """The inputs of nn.quantised_linear by name; of `matrix`, codes u8[N, K]."""

    x: Value
    matrix: Matrix
    bias: Value | None
    format: Format

    @staticmethod
    def of(op: Op) -> QuantisedLinear:
        x, codes, scales, zeros, bias = inputs_of(op).values()
        matrix = Matrix(codes, scales, zeros)
        return QuantisedLinear(x, matrix, bias, format_of(op, matrix))


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = QuantisedLinear.of(op)
    x, codes = parts.x, parts.matrix.codes
    require(op, len(codes.shape) == 2, f"{codes} is not u8[N, K]")
    require(op, len(x.shape) >= 1 and x.shape[-1] == codes.shape[1], f"{x} by {codes}")
    bias = parts.bias
    require(op, bias is None or bias.shape == codes.shape[:1], f"{bias} for {codes}")
    return (TensorType(x.dtype, (*x.shape[:-1], codes.shape[0])),)


@defop("nn.quantised_linear", _infer, "x, codes, scales, zeros?zeros, bias?biased", tokenwise=True)
def quantised_linear(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x[.., K], codes u8[N, K], scales[N, b], zeros[N, b]?, bias[N]? -> y[.., N].

    The weight is `formats.integer.dequantise` of codes, scales and zeros, the row is
    `formats.integer.round_rows` of x to `row_bits` (8, the default, or 16; 0: not rounded);
    the product and the bias are added in float32, then cast.
    """
    x, codes, scales, zeros, bias = tensors_of("nn.quantised_linear", op, tensors, attrs).values()
    rows = round_rows(x, scales.shape[-1], attrs.get("row_bits", 8))
    product = rows @ dequantise(attrs["kind"], codes, scales, zeros).mT
    return (product if bias is None else product + bias.float()).to(x.dtype)


QUANTISED_OPS = ("grouped.quantised", "grouped.mixed", "nn.quantised_linear")


class StoredMatrix(NamedTuple):
    """A matrix or a stack of them, its format, and for a stack of some experts their numbers."""

    matrix: Matrix
    format: Format
    experts: tuple[int, ...] = ()


def matrices_of(op: Op) -> tuple[StoredMatrix, ...]:
    """The weights of one of QUANTISED_OPS."""
    if op.name == "grouped.mixed":
        parts = GroupedMixed.of(op).parts
        return tuple(StoredMatrix(m, p.format, p.experts) for p in parts for m in p.matrices)
    if op.name == "grouped.quantised":
        quantised = GroupedQuantised.of(op)
        return tuple(StoredMatrix(matrix, quantised.format) for matrix in quantised.matrices)
    linear = QuantisedLinear.of(op)
    return (StoredMatrix(linear.matrix, linear.format),)
