"""Experts of few bits as sorted rows, with one product of codes per expert and projection.

    piece_e -> MatMulNBits(codes_e, scales_e, zeros_e)               ONNX Runtime's own operator
    piece_e -> MatMul(DequantizeLinear(codes_e, scales_e, zeros_e))  standard operators, opset 21

ONNX Runtime converts the second form to the first when it opens a file. Both round rows to 8 bits
with a scale per block (accuracy_level 4). float32 rows take three to nine times as long, and there
is no level in between, so they are requested only for formats with rows of 16 bits. Gate and up are
stacked in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os.path import commonprefix

import torch
from torch import Tensor

from moec.codegen.onnx.aten.matrix import of_experts
from moec.codegen.onnx.moe.encoding import Encoding, packed
from moec.codegen.onnx.moe.experts import by_expert, sorted_rows
from moec.codegen.onnx.profiles import MICROSOFT
from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.writer import NodeWriter, Weight
from moec.errors import NoMatch
from moec.ir.formats.notation import Format
from moec.ir.graph import Value
from moec.ir.ops.experts.quantised import GroupedQuantised

BLOCKED = 21
"""The first opset whose DequantizeLinear supports blocks and four bits."""
ROUNDED, FLOAT32 = 4, 1
"""The values of accuracy_level that round rows to 8 bits, and that do not round them."""


def accuracy_level(format: Format) -> int:
    return ROUNDED if format.row_bits == 8 else FLOAT32


@build("grouped.quantised")
def grouped_quantised(c: Call) -> str:
    w, parts = c.w, GroupedQuantised.of(c.op)
    if parts.format.kind == "fp8":
        raise NoMatch("fp8 weights have no ONNX form: quantise to int8, int4 or mxfp4")
    if parts.format.float_zeros:
        raise NoMatch("weights with float zeros have no ONNX form: quantise to int8 or int4")
    if not w.contrib and w.opset < BLOCKED:
        raise NoMatch(
            f"opset {w.opset} has no DequantizeLinear of blocks (block_size): choose opset "
            f"{BLOCKED} or later"
        )
    write = _contrib if w.contrib else _standard
    widths = [int(str(matrix.codes.shape[1])) for matrix in parts.matrices]
    rows = w.cast(sorted_rows(c, parts), parts.x.dtype, "f32")
    return by_expert(c, parts, rows, "f32", widths, write(w, parts))


@build("grouped.mixed")
def grouped_mixed(c: Call) -> str:
    raise NoMatch("experts of several formats have no ONNX form: choose one for a product")


@build("nn.quantised_linear")
def quantised_linear(c: Call) -> str:
    raise NoMatch("linears=… and head=… of quant have no ONNX form: quantise only the experts")


def _contrib(w: NodeWriter, parts: GroupedQuantised) -> Callable[[int, str], str]:
    stored = _Stored(w, parts)
    code, width = stored.encoding, stored.width
    short = code.blocks(width) * code.block - width

    def codes(stack: Tensor) -> Tensor:
        words = packed(torch.nn.functional.pad(stack, (0, short)), code.bits)
        return words.reshape(*words.shape[:-1], code.blocks(width), -1)

    def zeros(stack: Tensor) -> Tensor:
        return packed(stack, code.bits)

    shape = (stored.rows, code.blocks(width), code.block * code.bits // 8)
    packed_zeros = (stored.rows, -(-code.blocks(width) * code.bits // 8))

    def product(expert: int, rows: str) -> str:
        inputs = [
            rows,
            stored.codes(expert, "u8", shape, codes),
            stored.scales(expert, (stored.rows, code.blocks(width)), lambda stack: stack),
            stored.zeros(expert, "u8", packed_zeros, zeros),
            "",
            stored.bias(expert),
        ]
        while not inputs[-1]:
            inputs.pop()
        return w(
            "MatMulNBits",
            *inputs,
            domain=MICROSOFT,
            K=width,
            N=stored.rows,
            bits=code.bits,
            block_size=code.block,
            accuracy_level=accuracy_level(parts.format),
        )

    return product


def _standard(w: NodeWriter, parts: GroupedQuantised) -> Callable[[int, str], str]:
    stored = _Stored(w, parts)
    code, width = stored.encoding, stored.width
    signed = not parts.format.asymmetric
    dtype = f"{'i' if signed else 'u'}{code.bits}"
    middle = 1 << (code.bits - 1) if signed else 0

    def transpose(stack: Tensor) -> Tensor:
        """[K, N] as one row of bytes; code - 2^(bits-1) in two's complement if signed."""
        mask = (1 << code.bits) - 1
        flat = ((stack.int() - middle) & mask).byte().T.flatten()
        return packed(flat, code.bits)

    blocks = (code.blocks(width), stored.rows)

    def product(expert: int, rows: str) -> str:
        inputs = [
            stored.codes(expert, dtype, (width, stored.rows), transpose),
            stored.scales(expert, blocks, lambda stack: stack.T),
            stored.zeros(expert, dtype, blocks, transpose),
        ]
        matrix = w("DequantizeLinear", *filter(None, inputs), axis=0, block_size=code.block)
        bias = stored.bias(expert)
        return w("Gemm", rows, matrix, bias) if bias else w("MatMul", rows, matrix)

    return product


class _Stored:
    """The initializers of one expert: the rows of all its matrices concatenated, [rows, width]."""

    def __init__(self, w: NodeWriter, parts: GroupedQuantised) -> None:
        self.w = w
        self.matrices = parts.matrices
        self.encoding = Encoding.of([parts])
        self.rows = sum(int(str(m.codes.shape[1])) for m in parts.matrices)
        self.width = int(str(parts.matrices[0].codes.shape[2]))
        self.biases = of_experts(w, parts.biases) if parts.biases else []

    def codes(
        self, expert: int, dtype: str, shape: tuple[int, ...], last: Callable[[Tensor], Tensor]
    ) -> str:
        stacks = [m.codes for m in self.matrices]
        return self._piece(expert, stacks, dtype, shape, lambda t: last(self.encoding.codes(t)))

    def scales(self, expert: int, shape: tuple[int, ...], last: Callable[[Tensor], Tensor]) -> str:
        stacks = [m.scales for m in self.matrices]
        width = self.width
        return self._piece(
            expert, stacks, "f32", shape, lambda t: last(self.encoding.scales(t, width))
        )

    def zeros(
        self, expert: int, dtype: str, shape: tuple[int, ...], last: Callable[[Tensor], Tensor]
    ) -> str:
        """The zeros; "" if there are none."""
        stacks = [m.zeros for m in self.matrices if m.zeros is not None]
        width = self.width
        if not stacks:
            return ""
        return self._piece(
            expert, stacks, dtype, shape, lambda t: last(self.encoding.zeros(t, width))
        )

    def bias(self, expert: int) -> str:
        return self.biases[expert] if self.biases else ""

    def _piece(
        self,
        expert: int,
        stacks: Sequence[Value],
        dtype: str,
        shape: tuple[int, ...],
        make: Callable[[Tensor], Tensor],
    ) -> str:
        names = tuple(stack.name for stack in stacks)
        ending = names[0].rpartition(".")[2]
        parents = [name.rpartition(".")[0] for name in names]
        prefix = commonprefix(parents).rstrip("._")  # noqa: RUF071 - names, not paths
        weight = Weight(names, dtype, shape, lambda *ts: make(torch.cat([t[expert] for t in ts])))
        return self.w.weight(f"{prefix or names[0]}.{expert}.{ending}", weight)
