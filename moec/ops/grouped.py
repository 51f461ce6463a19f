"""grouped.*: the bodies of experts over all rows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.ir import DType, Op, TensorType, Value
from moec.ops.definition import Runner, defop, integer, require
from moec.sizes import normal


@dataclass(frozen=True)
class GroupedLinear:
    """The inputs of grouped.linear by name."""

    x: Value
    ends: Value
    matrices: tuple[Value, ...]
    biases: tuple[Value, ...]
    order: Value | None
    scale: Value | None

    @staticmethod
    def of(op: Op) -> GroupedLinear:
        x, ends, *rest = op.inputs
        count = integer(op, "matrices")
        matrices = tuple(rest[:count])
        rest = rest[count:]
        biases = tuple(rest[:count]) if op.attrs.get("biased") else ()
        rest = rest[len(biases) :]
        order = rest.pop(0) if op.attrs.get("gather") else None
        scale = rest.pop(0) if op.attrs.get("scaled") else None
        require(op, not rest, "has inputs that no attribute names")
        return GroupedLinear(x, ends, matrices, biases, order, scale)


def _infer_grouped_linear(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedLinear.of(op)
    for matrix in parts.matrices:
        require(op, len(matrix.shape) == 3, f"{matrix} is not [E, N, K]")
        require(op, matrix.shape[2] == parts.x.shape[1], f"{parts.x} by {matrix}")
        require(op, matrix.shape[:1] == parts.ends.shape, f"{matrix} for {parts.ends}")
    for matrix, bias in zip(parts.matrices, parts.biases, strict=False):
        require(op, bias.shape == matrix.shape[:2], f"{bias} for {matrix}")
    rows = parts.order.shape[0] if parts.order is not None else parts.x.shape[0]
    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (rows, parts.matrices[0].shape[1])),)


@defop("grouped.linear", _infer_grouped_linear)
def grouped_linear(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], matrices[E, N, K]…, biases[E, N]…, order[R]?, scale[T, k]? -> h[R, N].

    acc_j = row @ matrices_j[e].T (+ biases_j[e]), h = body(acc_0, …) or acc_0. Attributes:
    `matrices` (how many), `biased`, `gather` (k: x is [T, K] and row r reads x[order[r] // k];
    0: x is rows already), `scaled` (row r is first multiplied by scale[order[r]]), `dtype` of
    h. Rows that nobody owns are zero.
    """
    x, ends, *rest = tensors
    count, k = attrs["matrices"], attrs.get("gather", 0)
    matrices, rest = rest[:count], rest[count:]
    biases = [rest.pop(0) for _ in range(count)] if attrs.get("biased") else [None] * count
    if k:
        order = rest.pop(0).long()
        x = x[order // k]
        if attrs.get("scaled"):
            x = x * rest.pop(0).reshape(-1)[order][:, None].to(x.dtype)
    result = x.new_zeros(x.shape[0], matrices[0].shape[1], dtype=attrs["dtype"])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = x[start:end]
        parts = [
            torch.nn.functional.linear(rows, m[expert], None if b is None else b[expert])
            for m, b in zip(matrices, biases, strict=True)
        ]
        result[start:end] = (run(op.body, parts)[0] if op.body else parts[0]).to(attrs["dtype"])
        start = end
    return result


def _infer_expert_of(op: Op) -> tuple[TensorType, ...]:
    return (TensorType("i64", (normal(op.attrs["rows"]),)),)


@defop("grouped.expert_of", _infer_expert_of)
def expert_of(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """ends[E] -> the expert of each row, i64[R]; rows that nobody owns count as E - 1."""
    (ends,) = tensors
    rows = torch.arange(attrs["rows"])
    return torch.searchsorted(ends.long(), rows, right=True).clamp(max=len(ends) - 1)
