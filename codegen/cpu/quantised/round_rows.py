"""Rows of activations as integers of 8 or 16 bits: `round_rows` of formats as a kernel.

    x[R, K]  ->  codes int32[R, planes * words] (four or two to a word, 0 after K),
                 scales float32[R, blocks],
                 sums int32[R, planes * blocks] of the codes of each block, plane after plane

The sums are for the zeros of weights: sum (c - z) x = sum c x - z sum x. 16-bit integers whose
bytes are multiplied separately are stored in two planes (`RowCodes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.parallel import ELEMENT
from moec.codegen.cpu.quantised import integers
from moec.codegen.cpu.quantised.layout import BYTES, RowCodes
from moec.codegen.cpu.vector import Vector
from moec.ir.formats.integer import TINY, most_of
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class RoundedRows:
    """The outputs of this kernel, as arguments of the kernels that read them."""

    codes: Buffer
    scales: Buffer
    sums: Buffer

    @staticmethod
    def of(rows: Expr, width: int, blocks: int = 1, form: RowCodes = BYTES) -> RoundedRows:
        """Declares the arguments for `rows` rows of `width` elements."""
        return RoundedRows(
            argument("x", (rows, form.planes * form.words(width)), "int32"),
            argument("x_scales", (rows, blocks), "float32"),
            argument("sums", (rows, form.planes * blocks), "int32"),
        )


def round_rows(
    target: CpuTarget,
    width: int,
    blocks: int,
    dtype: str,
    name: str = "round_rows",
    form: RowCodes = BYTES,
) -> PrimFunc:
    """A kernel (x[R, width], codes, scales, sums); `blocks` divides `width`."""
    words, planes = form.words(width), form.planes
    with kernel(name, target) as frame:
        rows = T.int64()
        x = argument("x", (rows, width), dtype)
        codes = argument("codes", (rows, planes * words), "int32")
        scales = argument("scales", (rows, blocks), "float32")
        sums = argument("sums", (rows, planes * blocks), "int32")
        v = Vector(target)
        work = rows * (width * ELEMENT)
        with parallel.parallel_for(rows, work) as row:
            for word in range(-(-width // v.lanes) * v.lanes // form.per_word, words):
                for plane in range(planes):
                    T.buffer_store(codes, T.int32(0), [row, plane * words + word])
            with T.serial(0, blocks) as block:
                _RowBlock(v, x, codes, row, block, blocks, form).run(scales, sums)
    return frame.function


class _RowBlock:
    """One block of one row."""

    def __init__(
        self,
        v: Vector,
        x: Buffer,
        codes: Buffer,
        row: Expr,
        block: Expr,
        blocks: int,
        form: RowCodes,
    ) -> None:
        width = int(x.shape[1])
        self.v, self.x, self.codes, self.row, self.size = v, x, codes, row, width // blocks
        self.form, self.most, self.words = form, most_of(form.bits), form.words(width)
        self.start = T.bind(block * self.size)
        self.block, self.blocks = block, blocks

    def run(self, scales: Buffer, sums: Buffer) -> None:
        v = self.v
        lanes = T.ramp(0, 1, v.lanes)
        greatest = T.alloc_buffer((v.lanes,), "float32")
        strange = T.alloc_buffer((v.lanes,), "float32")
        added = [T.alloc_buffer((v.lanes,), "int32") for _ in range(self.form.planes)]
        for buffer in (greatest, strange):
            T.buffer_store(buffer, v.splat(0.0), [lanes])
        for buffer in added:
            T.buffer_store(buffer, T.broadcast(T.int32(0), v.lanes), [lanes])

        def look(x: Expr, at: Expr) -> None:
            size, most = v.abs(x), T.bind(greatest[lanes])
            T.buffer_store(greatest, T.Select(size > most, size, most), [lanes])
            # x * 0 is 0 for every number, and NaN for infinities and NaN.
            T.buffer_store(strange, v.fma(x, v.splat(0.0), strange[lanes]), [lanes])

        self.each(look)
        most = T.bind(v.max(greatest[lanes]))
        scale = most * T.float32(1 / self.most) + v.sum(strange[lanes])
        T.buffer_store(scales, scale, [self.row, self.block])
        inverse = T.bind(
            T.Select(most > T.float32(TINY), T.float32(self.most) / most, T.float32(0.0))
        )

        def write(x: Expr, at: Expr) -> None:
            codes = integers.rounded(v, x, inverse)
            parts = [codes] if self.form.planes == 1 else integers.signed_bytes(v, codes)
            for plane, (part, sum) in enumerate(zip(parts, added, strict=True)):
                index = [self.row, plane * self.words + T.truncdiv(at, self.form.per_word)]
                integers.store_narrow(v, self.codes, index, part, 32 // self.form.per_word)
                T.buffer_store(sum, sum[lanes] + part, [lanes])

        self.each(write)
        for plane, sum in enumerate(added):
            index = [self.row, plane * self.blocks + self.block]
            T.buffer_store(sums, integers.total(v, sum[lanes]), index)

    def each(self, action: object) -> None:
        """`action(x, where)` for all vectors of the block; lanes after its end are 0."""
        v, full_vectors = self.v, self.size // self.v.lanes
        assert callable(action)
        with T.serial(0, full_vectors) as c:
            at = T.bind(self.start + c * v.lanes)
            action(v.load(self.x, [self.row, at]), at)
        if left := self.size % v.lanes:
            at = T.bind(self.start + full_vectors * v.lanes)
            action(v.load_tail(self.x, [self.row, at], T.int32(left)), at)
