"""grouped.combine: the experts' last product and the sum over each token's choices, as one op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.ir.graph import DType, Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, integer, require
from moec.ir.ops.experts.dispatch import combine
from moec.ir.ops.experts.grouped import grouped_linear
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True)
class GroupedCombine:
    """The inputs by name."""

    rows: Value
    ends: Value
    matrix: Value
    bias: Value | None
    order: Value
    weights: Value | None

    @staticmethod
    def of(op: Op) -> GroupedCombine:
        return GroupedCombine(**inputs_of(op))


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedCombine.of(op)
    tokens, k = cast(Dim, op.attrs["tokens"]), integer(op, "k")
    require(op, len(parts.matrix.shape) == 3, f"{parts.matrix} is not [E, N, K]")
    require(op, parts.matrix.shape[2] == parts.rows.shape[1], f"{parts.rows} by {parts.matrix}")
    require(op, parts.matrix.shape[:1] == parts.ends.shape, f"{parts.matrix} for {parts.ends}")
    require(op, parts.order.shape == (k * tokens,), f"{parts.order} does not hold the choices")
    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (tokens, parts.matrix.shape[1])),)


@defop("grouped.combine", _infer, "rows, ends, matrix, bias?biased, order, weights?weighted")
def grouped_combine(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """rows[R, K], ends[E], w[E, N, K], b[E, N]?, order[R], weights[T, k]? -> z[T, N].

    z = combine(rows @ w[e]^T (+ b[e]), order, weights). Attributes: `biased`, `weighted`, `k`,
    `tokens` (T), `dtype` of z. The gradient of the weights needs no further product
    (`moec.dynamo.training.gradients`).
    """
    count = 4 if attrs.get("biased") else 3
    linear = {"matrices": 1, "biased": count == 4, "dtype": tensors[0].dtype}
    y = grouped_linear(op, tensors[:count], linear, run)
    return combine(op, [y, *tensors[count:]], attrs, run)
