"""grouped.quantised: grouped.linear with weights of few bits, and rows of 8 or 16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.dtypes import VECTOR_DTYPES
from moec.ir.formats.integer import MOST_SUMMED, dequantise, round_rows
from moec.ir.formats.notation import KINDS, MXFP4_BLOCK, ROW_BITS, Format
from moec.ir.graph import Op, TensorType, Value
from moec.ir.opdef import Runner, defop, require, tensors_of
from moec.ir.ops.experts.grouped import INPUTS, Grouped, batches, grouped, in_float32, rows_of
from moec.ir.sizes.dims import Dim


@dataclass(frozen=True)
class Matrix:
    """codes u8[E, N, K], scales [E, N, blocks], and zeros [E, N, blocks], u8 or of the scales'
    dtype, or None."""

    codes: Value
    scales: Value
    zeros: Value | None = None

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(v for v in (self.codes, self.scales, self.zeros) if v is not None)


@dataclass(frozen=True)
class GroupedQuantised(Grouped[Matrix]):
    """The inputs of grouped.quantised by name."""

    format: Format

    @staticmethod
    def of(op: Op) -> GroupedQuantised:
        parts = grouped(op, 2 + bool(op.attrs.get("zeros")), Matrix)
        return GroupedQuantised(**vars(parts), format=format_of(op, parts.matrices[0]))


def format_of(op: Op, matrix: Matrix) -> Format:
    """The format of a matrix, from its shapes and the op's attributes `kind`, `zeros` and
    `row_bits`. Raises IRError where they do not match."""
    return check_matrix(op, matrix, op.attrs.get("kind"), op.attrs.get("row_bits", 8))


def check_matrix(op: Op, matrix: Matrix, kind: object, bits: object) -> Format:
    """The format of a matrix. Raises IRError where it has none."""
    zeros = matrix.zeros is not None
    require(op, kind in KINDS, f"kind is {kind}, not one of {', '.join(KINDS)}")
    codes, scales = matrix.codes, matrix.scales
    width, blocks = codes.shape[-1], scales.shape[-1]
    require(op, isinstance(width, int) and isinstance(blocks, int), "has symbolic weights")
    assert isinstance(width, int)
    assert isinstance(blocks, int)
    require(op, blocks >= 1 and width % blocks == 0, f"{blocks} blocks of {width}")
    require(op, width // blocks <= MOST_SUMMED, f"one scale of {width // blocks} weights")
    block = width // blocks if blocks > 1 or kind == "mxfp4" else 0
    require(op, bits in ROW_BITS, f"row_bits is {bits}, not one of 0, 8, 16")
    stored = "bf16" if kind == "mxfp4" else scales.dtype
    require(op, stored in VECTOR_DTYPES, f"{scales} is not of {', '.join(VECTOR_DTYPES)}")
    floats = matrix.zeros is not None and matrix.zeros.dtype != "u8"
    format = Format(cast(str, kind), block, zeros, cast(int, bits), stored, floats)
    if kind == "mxfp4":
        require(op, block == MXFP4_BLOCK, "mxfp4 has blocks of 32")
    require(op, not (zeros and kind in ("mxfp4", "fp8")), f"{kind} has no zeros")
    require(op, codes.dtype == "u8", f"{codes} is not of u8")
    require(op, scales.shape[:-1] == codes.shape[:-1], f"{scales} for {codes}")
    require(op, scales.dtype == format.scale_dtype, f"{scales} of {format}")
    if matrix.zeros is not None:
        expected = TensorType(format.zero_dtype, scales.shape)
        require(op, matrix.zeros.type == expected, f"{matrix.zeros} is not {expected}")
    return format


def _infer(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedQuantised.of(op)
    for matrix in parts.matrices:
        format_of(op, matrix)
    check_stacks(op, parts.x, parts.ends.shape, parts.matrices)
    for matrix, bias in zip(parts.matrices, parts.biases, strict=False):
        require(op, bias.shape == matrix.codes.shape[:2], f"{bias} for {matrix.codes}")
    return rows_of(op, parts, parts.matrices[0].codes.shape[1])


def check_stacks(op: Op, x: Value, experts: tuple[Dim, ...], matrices: Sequence[Matrix]) -> None:
    """Raises IRError where stacks are not of so many experts, or not for rows of x."""
    for matrix in matrices:
        codes, scales = matrix.codes, matrix.scales
        require(op, len(codes.shape) == 3, f"{codes} is not u8[E, N, K]")
        require(op, codes.shape[2] == x.shape[1], f"{x} by {codes}")
        require(op, codes.shape[:1] == experts, f"{codes} for {experts[0]} experts")
        first = matrices[0].scales
        require(op, scales.shape == first.shape, f"{scales} beside {first}")


@defop("grouped.quantised", _infer, INPUTS, tokenwise=True)
def grouped_quantised(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], (codes[E, N, K], scales[E, N, b], zeros[E, N, b]?)…, biases[E, N]…,
    order[R]?, scale[T, k]? -> h[R, N].

    As grouped.linear, where matrix j of expert e is `formats.integer.dequantise` of codes, scales
    and zeros, the row is `formats.integer.round_rows` of x to `row_bits` (8, the default, or 16;
    0: not rounded), and products are in float32. `kind` is one of `notation.KINDS`; `zeros` is set
    where zeros exist. `scaled` multiplies the product. `exact_rows` does not round the rows,
    whatever `row_bits` is; no kernel of moec computes that.
    """
    inputs = tensors_of("grouped.quantised", op, tensors, attrs)
    x, kind = inputs["x"], attrs["kind"]
    stored = batches(inputs["matrices"], 2 + bool(attrs.get("zeros")))
    exact = bool(attrs.get("exact_rows"))
    bits = attrs.get("row_bits", 8)
    rows = x.float() if exact else round_rows(x, stored[0][1].shape[-1], bits)

    def matrices(expert: int) -> list[torch.Tensor]:
        return [dequantise(kind, *(part[expert] for part in parts)) for parts in stored]

    return in_float32(op, lambda _: rows, inputs, attrs, run, matrices, stored[0][0].shape[1])
