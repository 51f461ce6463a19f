"""nn.quantised_linear: a linear layer with weights of few bits, and rows of 8 or 16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.formats.integer import Format, dequantise, round_rows
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, require
from moec.ops.quantised import GroupedQuantised, Matrix, format_of


@dataclass(frozen=True)
class QuantisedLinear:
    """The inputs of nn.quantised_linear by name; of `matrix`, codes u8[N, K]."""

    x: Value
    matrix: Matrix
    bias: Value | None
    format: Format

    @staticmethod
    def of(op: Op) -> QuantisedLinear:
        zeros, biased = bool(op.attrs.get("zeros")), bool(op.attrs.get("biased"))
        count = 3 + zeros + biased
        require(op, len(op.inputs) == count, f"has {len(op.inputs)} inputs, not {count}")
        x, codes, scales, *rest = op.inputs
        matrix = Matrix(codes, scales, rest.pop(0) if zeros else None)
        return QuantisedLinear(x, matrix, rest.pop(0) if biased else None, format_of(op, matrix))


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = QuantisedLinear.of(op)
    x, codes = parts.x, parts.matrix.codes
    require(op, len(codes.shape) == 2, f"{codes} is not u8[N, K]")
    require(op, len(x.shape) >= 1 and x.shape[-1] == codes.shape[1], f"{x} by {codes}")
    bias = parts.bias
    require(op, bias is None or bias.shape == codes.shape[:1], f"{bias} for {codes}")
    return (TensorType(x.dtype, (*x.shape[:-1], codes.shape[0])),)


@defop("nn.quantised_linear", _infer)
def quantised_linear(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x[.., K], codes u8[N, K], scales[N, b], zeros u8[N, b]?, bias[N]? -> y[.., N].

    The weight is `quantisation.dequantise` of codes, scales and zeros, the row is
    `quantisation.round_rows` of x to `row_bits` (8 where that is not given, or 16); the product and
    the bias are added in float32, then cast.
    """
    x, *rest = tensors
    matrix = [rest.pop(0) for _ in range(2 + bool(attrs.get("zeros")))]
    rows = round_rows(x, matrix[1].shape[-1], attrs.get("row_bits", 8))
    product = rows @ dequantise(attrs["kind"], *matrix).mT
    return (product + rest[0].float() if rest else product).to(x.dtype)


QUANTISED_OPS = ("grouped.quantised", "nn.quantised_linear")


def matrices_of(op: Op) -> tuple[Matrix, ...]:
    """The weights of one of QUANTISED_OPS."""
    if op.name == "grouped.quantised":
        return GroupedQuantised.of(op).matrices
    return (QuantisedLinear.of(op).matrix,)
