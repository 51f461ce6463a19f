"""grouped.*: products of sorted rows, each with the weights of its expert."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import DType, Op, TensorType, Value
from moec.ir.opdef import Runner, defop, inputs_of, integer, require, tensors_of
from moec.ir.ops.experts.dispatch import combine
from moec.ir.sizes.dims import Dim, canonical

M = TypeVar("M")
V = TypeVar("V")

INPUTS = "x, ends, matrices*, biases*matrices?biased, order?gather, scale?scaled"
"""The signature of every product of sorted rows. `matrices` holds the parts of stored weights."""


@dataclass(frozen=True)
class Grouped(Generic[M]):
    """The inputs of a product of sorted rows, by name. M is the type of one stack [E, N, K]."""

    x: Value
    ends: Value
    matrices: tuple[M, ...]
    biases: tuple[Value, ...]
    order: Value | None
    scale: Value | None

    def storing(self, matrices: Iterable[Value]) -> list[Value]:
        """The inputs of the same product over other stored matrices, in order."""
        last = [value for value in (self.order, self.scale) if value is not None]
        return [self.x, self.ends, *matrices, *self.biases, *last]


def grouped(op: Op, each: int, matrix: Callable[..., M]) -> Grouped[M]:
    """The inputs of an op by name; `matrix` makes one M of each `each` consecutive inputs."""
    count = integer(op, "matrices")
    inputs = inputs_of(op)
    stored = inputs["matrices"]
    require(op, count >= 1 and len(stored) >= count * each, "lacks parts of its matrices")
    require(op, len(stored) == count * each, "has inputs that no attribute names")
    matrices = tuple(matrix(*parts) for parts in batches(stored, each))
    return Grouped(**{**inputs, "matrices": matrices})


def batches(items: Sequence[V], size: int) -> list[Sequence[V]]:
    """The items in consecutive groups of `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def rows_of(op: Op, parts: Grouped[M], width: Dim) -> tuple[TensorType, ...]:
    """The type of rows that are `width` wide."""
    rows = parts.order.shape[0] if parts.order is not None else parts.x.shape[0]
    return (TensorType(cast(DType, op.attrs["dtype"]).name, (rows, width)),)


@dataclass(frozen=True)
class GroupedLinear(Grouped[Value]):
    """The inputs of grouped.linear by name."""

    @staticmethod
    def of(op: Op) -> GroupedLinear:
        return GroupedLinear(**vars(grouped(op, 1, lambda matrix: matrix)))


def _infer_grouped_linear(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedLinear.of(op)
    for matrix in parts.matrices:
        require(op, len(matrix.shape) == 3, f"{matrix} is not [E, N, K]")
        require(op, matrix.shape[2] == parts.x.shape[1], f"{parts.x} by {matrix}")
        require(op, matrix.shape[:1] == parts.ends.shape, f"{matrix} for {parts.ends}")
    for matrix, bias in zip(parts.matrices, parts.biases, strict=False):
        require(op, bias.shape == matrix.shape[:2], f"{bias} for {matrix}")
    return rows_of(op, parts, parts.matrices[0].shape[1])


@defop("grouped.linear", _infer_grouped_linear, INPUTS, tokenwise=True)
def grouped_linear(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], matrices[E, N, K]…, biases[E, N]…, order[R]?, scale[T, k]? -> h[R, N].

    acc_j = row @ matrices_j[e].T (+ biases_j[e]), h = body(acc_0, …) or acc_0. Attributes:
    `matrices` (how many), `biased`, `gather` (k: x is [T, K] and row r reads x[order[r] // k];
    0: x is rows already), `scaled` (row r is first multiplied by scale[order[r]]), `dtype` of
    h. Rows without an expert are zero.
    """
    inputs = tensors_of("grouped.linear", op, tensors, attrs)
    x, ends, matrices, biases, order, scale = inputs.values()
    if order is not None:
        x = x[order.long() // attrs["gather"]]
        if scale is not None:
            x = x * scale.reshape(-1)[order.long()][:, None].to(x.dtype)
    # The backward passes of split and cat copy each row once; those of slices all rows each time.
    *each, unowned = x.split([b - a for a, b in pairwise([0, *ends.tolist(), len(x)])])
    results = []
    for expert, rows in enumerate(each):
        parts = [
            torch.nn.functional.linear(rows, m[expert], None if b is None else b[expert])
            for m, b in zip(matrices, biases or [None] * len(matrices), strict=True)
        ]
        results.append((run(op.body, parts)[0] if op.body else parts[0]).to(attrs["dtype"]))
    results.append(x.new_zeros(len(unowned), matrices[0].shape[1], dtype=attrs["dtype"]))
    return torch.cat(results)


def in_float32(
    op: Op,
    rows: Callable[[int], Tensor],
    inputs: Mapping[str, Any],
    attrs: Mapping[str, Any],
    run: Runner,
    matrices: Callable[[int], Sequence[Tensor]],
    width: int,
) -> Tensor:
    """grouped.linear in float32; `scaled` multiplies the product.

    `inputs` are the op's inputs by name; `rows(e)` returns x as an expert reads it, f32[.., K],
    `matrices(e)` its matrices, f32[width, K] each.
    """
    ends, order, scale = (inputs[name] for name in ("ends", "order", "scale"))
    biases = inputs["biases"] or [None] * attrs["matrices"]
    at = torch.arange(len(inputs["x"]))
    if order is not None:
        at = order.long() // attrs["gather"]
        if scale is not None:
            scale = scale.reshape(-1)[order.long()][:, None].float()
    x: Tensor = inputs["x"]
    result = x.new_zeros(len(at), width, dtype=attrs["dtype"])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start == end:
            continue
        parts = []
        for matrix, bias in zip(matrices(expert), biases, strict=True):
            product = rows(expert)[at[start:end]] @ matrix.mT
            product = product if scale is None else product * scale[start:end]
            product = product if bias is None else product + bias[expert].float()
            parts.append(product)
        if op.body is not None:
            sums = [p.to(TORCH_DTYPES[v.dtype]) for p, v in zip(parts, op.body.inputs, strict=True)]
            parts = list(run(op.body, sums))
        result[start:end] = parts[0].to(attrs["dtype"])
        start = end
    return result


def _infer_expert_of(op: Op) -> tuple[TensorType, ...]:
    return (TensorType("i64", (canonical(op.attrs["rows"]),)),)


@defop("grouped.expert_of", _infer_expert_of, "ends")
def expert_of(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """ends[E] -> the expert of each row, i64[R]; E - 1 for rows without an expert."""
    (ends,) = tensors
    rows = torch.arange(attrs["rows"])
    return torch.searchsorted(ends.long(), rows, right=True).clamp(max=len(ends) - 1)


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
