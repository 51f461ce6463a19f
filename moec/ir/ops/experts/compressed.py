"""moe.decompress and grouped.compressed: compressed weights, as stacks and in a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.ir.formats.compressed import KIND, MOST_WIDTH, PARTS, decompress
from moec.ir.formats.integer import round_rows
from moec.ir.formats.ternary import starts_shape
from moec.ir.graph import DType, Op, TensorType, Value
from moec.ir.opdef import Runner, defop, integer, require, tensors_of
from moec.ir.ops.experts.grouped import INPUTS, Grouped, batches, grouped, in_float32, rows_of

X_BITS = 16


def _check(op: Op, matrix: Sequence[Value], width: object) -> None:
    """The rules of a compressed stack whose rows hold `width` weights."""
    kind = op.attrs.get("kind")
    require(op, kind == KIND, f"kind is {kind}, not {KIND}")
    require(op, isinstance(width, int) and 1 <= width <= MOST_WIDTH, f"rows of {width} weights")
    grid = matrix[-1]
    # Graphs that were upcast hold the grid in float32.
    fits = grid.dtype in ("bf16", "f32") and len(grid.shape) == 3 and grid.shape[2] == 2
    require(op, fits, f"{grid} is not bf16[E, N, 2]")
    experts, rows, _ = grid.shape
    stream, starts = matrix[:2]
    require(op, stream.dtype == "i16" and len(stream.shape) == 1, f"{stream} is not i16[W]")
    each = [TensorType("u8", starts_shape(experts * rows, size)) for size in (1, 2)]
    require(op, starts.type in each, f"{starts} is not {each[0]} or {each[1]}")


def _infer_decompress(op: Op) -> tuple[TensorType, ...]:
    width = integer(op, "width")
    require(op, len(op.inputs) == len(PARTS), f"takes {', '.join(PARTS)}")
    _check(op, op.inputs, width)
    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (*op.inputs[-1].shape[:2], width)),)


@defop("moe.decompress", _infer_decompress, "parts*")
def moe_decompress(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """The parts of a compressed stack (`moec.ir.formats.compressed`) -> its weights [E, N, width].

    Attributes: `kind`, `width`, `dtype`.
    """
    return decompress(tensors, attrs["width"]).to(attrs["dtype"])


@dataclass(frozen=True)
class GroupedCompressed(Grouped[tuple[Value, ...]]):
    """The inputs of grouped.compressed by name; a matrix is its parts, the grid last."""

    @staticmethod
    def of(op: Op) -> GroupedCompressed:
        return GroupedCompressed(**vars(grouped(op, len(PARTS), lambda *values: values)))


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedCompressed.of(op)
    first = parts.matrices[0][-1]
    for matrix in parts.matrices:
        _check(op, matrix, parts.x.shape[1])
        require(op, matrix[-1].shape[:1] == parts.ends.shape, f"{matrix[-1]} for {parts.ends}")
        require(op, matrix[-1].shape == first.shape, f"{matrix[-1]} beside {first}")
    for bias in parts.biases:
        require(op, bias.shape == first.shape[:2], f"{bias} for {first}")
    return rows_of(op, parts, first.shape[1])


@defop("grouped.compressed", _infer, INPUTS, tokenwise=True)
def grouped_compressed(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], (parts of a stack)…, biases[E, N]…, order[R]?, scale[T, k]? -> h[R, N].

    As grouped.linear, where each stack is moe.decompress of its parts, the row is
    `formats.integer.round_rows` of x to `row_bits`, 16 by default, and products are in float32.
    `kind` is ternary. `scaled` multiplies the product.
    """
    inputs = tensors_of("grouped.compressed", op, tensors, attrs)
    x = inputs["x"]
    stored = batches(inputs["matrices"], len(PARTS))
    stacks = [decompress(parts, x.shape[1]) for parts in stored]

    def matrices(expert: int) -> list[torch.Tensor]:
        return [stack[expert] for stack in stacks]

    rows = round_rows(x, 1, attrs.get("row_bits", X_BITS))
    return in_float32(op, lambda _: rows, inputs, attrs, run, matrices, stacks[0].shape[1])
