"""Vector arithmetic of CPU kernels: float32 lanes of one target, as TIR expressions.

    v = Vector(target)
    with kernel(name, target):
        ...
        with T.parallel(0, t) as i:
            x = v.load(X, [i, d * v.lanes])         # X: float32, bfloat16 or float16
            v.store(Y, [i, d * v.lanes], v.fma(x, x, v.splat(1.0)))

TIR expressions are trees: a value used twice is computed (and, nested, visited) twice unless
it is bound. `load` and every function here bind their results; bind others with `v.bind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.llvm.constants import ERF_P, ERF_Q, TANH_P, TANH_Q
from moec.target.cpu import CpuTarget

_TANH_LIMIT = 7.90531110763549805
# erfc(z) = t exp(p(t) - z^2) with t = 1 / (1 + z/2): Numerical Recipes, erfcc.
_ERFC = (
    0.17087277,
    -0.82215223,
    1.48851587,
    -1.13520398,
    0.27886807,
    -0.18628806,
    0.09678418,
    0.37409196,
    1.00002368,
    -1.26551223,
)


@dataclass(frozen=True)
class Vector:
    """Float32 vectors of `target.vector_lanes` lanes. All methods need an open prim_func."""

    target: CpuTarget

    @property
    def lanes(self) -> int:
        return self.target.vector_lanes

    @property
    def dtype(self) -> str:
        return f"float32x{self.lanes}"

    def bind(self, value: Expr) -> Expr:
        """Binds the value to a variable, so that it is computed once."""
        return T.bind(value)

    def splat(self, value: float | Expr) -> Expr:
        """One float32 in all lanes."""
        scalar = T.float32(value) if isinstance(value, int | float) else value
        return T.broadcast(scalar, self.lanes)

    # Memory: buffers of float32, bfloat16 or float16, `index` the first of `lanes` elements.

    def load(self, buffer: Buffer, index: Sequence[Expr | int]) -> Expr:
        return self._call(f"load_{buffer.dtype}", T.address_of(buffer[tuple(index)]))

    def load_tail(self, buffer: Buffer, index: Sequence[Expr | int], count: Expr) -> Expr:
        """The first `count` (int32) elements, 0 in the other lanes, whose memory is not read."""
        where = T.address_of(buffer[tuple(index)])
        return self._call(f"load_tail_{buffer.dtype}", where, T.cast(count, "int32"))

    def store(self, buffer: Buffer, index: Sequence[Expr | int], value: Expr) -> None:
        """Rounds to the buffer's type, to nearest and ties to even."""
        where = T.address_of(buffer[tuple(index)])
        T.evaluate(self._raw("int32", f"store_{buffer.dtype}", where, value))

    def store_tail(
        self,
        buffer: Buffer,
        index: Sequence[Expr | int],
        value: Expr,
        count: Expr,
    ) -> None:
        """Stores the first `count` (int32) lanes; memory after them is not written."""
        where, lanes = T.address_of(buffer[tuple(index)]), T.cast(count, "int32")
        T.evaluate(self._raw("int32", f"store_tail_{buffer.dtype}", where, value, lanes))

    def scalar(self, buffer: Buffer, index: Sequence[Expr | int]) -> Expr:
        """One element of a float buffer as a float32 scalar."""
        where = T.address_of(buffer[tuple(index)])
        return T.bind(self._raw("float32", f"scalar_{buffer.dtype}", where))

    def prefetch(self, buffer: Buffer, index: Sequence[Expr | int]) -> None:
        """Prefetches a cache line; any address is allowed."""
        T.evaluate(self._raw("int32", "prefetch", T.address_of(buffer[tuple(index)])))

    # Pairs: two consecutive 16-bit elements as one int32, the first in the low half.

    def pair(self, buffer: Buffer, index: Sequence[Expr | int]) -> Expr:
        return T.bind(self._raw("int32", "pair", T.address_of(buffer[tuple(index)])))

    def last(self, buffer: Buffer, index: Sequence[Expr | int]) -> Expr:
        """The pair of the last element of a row of odd length and 0."""
        return T.bind(self._raw("int32", "last", T.address_of(buffer[tuple(index)])))

    def low(self, pairs: Expr) -> Expr:
        """int32 lanes of bf16 pairs -> the first of each pair as float32."""
        return self._call("low", pairs)

    def high(self, pairs: Expr) -> Expr:
        """int32 lanes of bf16 pairs -> the second of each pair as float32."""
        return self._call("high", pairs)

    def dot2(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """acc + the dot products of bf16 pairs (int32 lanes); needs `target.bf16_dot`."""
        return self._raw(self.dtype, "dot2", acc, a, b)

    # Rows of bf16 as words of two consecutive elements.

    def words(self, buffer: Buffer, index: Sequence[Expr | int]) -> Expr:
        """int32 lanes: 2 * `lanes` elements from `index` on."""
        return self._words("words", T.address_of(buffer[tuple(index)]))

    def pairs(
        self, buffer: Buffer, index: Sequence[Expr | int], other: Sequence[Expr | int] | None
    ) -> Expr:
        """int32 lanes: elements from `index` on, each with one from `other` on, or with 0."""
        first = self._words("halves", T.address_of(buffer[tuple(index)]))
        if other is None:
            return first
        second = self._words("halves", T.address_of(buffer[tuple(other)]))
        return self._words("even", first, second)

    def scratch(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer that is read and written by address. TVM shrinks all other buffers to the
        elements that it sees used."""
        buffer = T.alloc_buffer(shape, dtype)
        ends = buffer[(0,) * len(shape)], buffer[tuple(size - 1 for size in shape)]
        T.evaluate(self._raw("int32", "whole", *map(T.address_of, ends)))
        return buffer

    # Tile registers, if `target.bf16_tiles`: between begin and end, in one task. An element is
    # passed by address; `stride` is in bytes, from one row of a register to the next.

    def tiles(self, which: str) -> None:
        """ "begin" or "end" of a task's use of the registers."""
        T.evaluate(self._raw("int32", f"tiles_{which}"))

    def tile_zero(self, register: int) -> None:
        T.evaluate(self._raw("int32", f"tile_zero_{register}"))

    def tile_load(self, register: int, element: Expr, stride: int) -> None:
        where = T.address_of(element)
        T.evaluate(self._raw("int32", f"tile_load_{register}", where, T.int64(stride)))

    def tile_load_either(
        self, register: int, first: Expr, one: Expr, stride: int, other: Expr, other_stride: int
    ) -> None:
        """Loads from `one` where `first` (int32) is not 0, and from `other` otherwise."""
        where = (T.address_of(one), T.int64(stride), T.address_of(other), T.int64(other_stride))
        T.evaluate(self._raw("int32", f"tile_load_either_{register}", first, *where))

    def tile_store(self, register: int, element: Expr, stride: int) -> None:
        where = T.address_of(element)
        T.evaluate(self._raw("int32", f"tile_store_{register}", where, T.int64(stride)))

    def tile_bf16(self, sums: int, rows: int, weights: int) -> None:
        """sums[16, 16] += rows[16, 32 bf16] @ weights[16 pairs, 16]."""
        T.evaluate(self._raw("int32", f"tile_bf16_{sums}_{rows}_{weights}"))

    def tile_int8(self, sums: int, rows: int, weights: int, signed: bool) -> None:
        """sums[16, 16 int32] += rows[16, 64 int8] @ weights[16 quadruples of int8 or uint8, 16]."""
        name = f"tile_{'int8' if signed else 'uint8'}_{sums}_{rows}_{weights}"
        T.evaluate(self._raw("int32", name))

    def copy_line(self, to: Expr, source: Expr) -> None:
        """64 bytes."""
        T.evaluate(self._raw("int32", "copy_line", T.address_of(to), T.address_of(source)))

    # Arithmetic on float32 lanes. NaN in, NaN out.

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        """a * b + c, rounded once where the target can."""
        return self._raw(self.dtype, "fma", a, b, c)

    def sqrt(self, x: Expr) -> Expr:
        return self._call("sqrt", x)

    def abs(self, x: Expr) -> Expr:
        return self._call("fabs", x)

    def clamp(self, x: Expr, low: float, high: float) -> Expr:
        """min(max(x, low), high); NaN stays NaN, as in torch."""
        return self.at_most(self.at_least(x, low), high)

    def at_least(self, x: Expr, low: float) -> Expr:
        """max(x, low); NaN stays NaN."""
        x = T.bind(x)
        return T.bind(T.Select(x < self.splat(low), self.splat(low), x))

    def at_most(self, x: Expr, high: float) -> Expr:
        """min(x, high); NaN stays NaN."""
        x = T.bind(x)
        return T.bind(T.Select(x > self.splat(high), self.splat(high), x))

    def exp(self, x: Expr) -> Expr:
        """About 1 ulp; 0 below -104 and infinity above 88.8."""
        return self._call("exp", x)

    def sigmoid(self, x: Expr) -> Expr:
        return T.bind(self.splat(1.0) / (self.splat(1.0) + self.exp(self.splat(0.0) - x)))

    def silu(self, x: Expr) -> Expr:
        x = T.bind(x)
        return T.bind(x / (self.splat(1.0) + self.exp(self.splat(0.0) - x)))

    def tanh(self, x: Expr) -> Expr:
        x = self.clamp(x, -_TANH_LIMIT, _TANH_LIMIT)
        square = T.bind(x * x)
        return T.bind(x * self._poly(TANH_P, square) / self._poly(TANH_Q, square))

    def erf(self, x: Expr) -> Expr:
        x = self.clamp(x, -4.0, 4.0)
        square = T.bind(x * x)
        return T.bind(x * self._poly(ERF_P, square) / self._poly(ERF_Q, square))

    def gelu(self, x: Expr) -> Expr:
        """x * Phi(x), by erfc, so that small results keep their digits; infinity gives NaN."""
        x = T.bind(x)
        z = T.bind(self.abs(x) * self.splat(0.7071067811865476))
        t = T.bind(self.splat(1.0) / self.fma(z, self.splat(0.5), self.splat(1.0)))
        tail = self.exp(self._poly(_ERFC, t) - z * z)
        half = T.bind(x * self.splat(0.5) * t * tail)  # x * Phi(-|x|)
        return T.bind(T.Select(x > self.splat(0.0), x - half, half))

    def gelu_tanh(self, x: Expr) -> Expr:
        """The tanh approximation of gelu: x (1 + tanh u) / 2, which is x sigmoid(2 u)."""
        x = T.bind(x)
        cubic = self.fma(self.splat(0.044715) * x, x, self.splat(1.0))
        u = T.bind(self.splat(-2 * 0.7978845608028654) * x * cubic)
        return T.bind(x / (self.splat(1.0) + self.exp(u)))

    def relu(self, x: Expr) -> Expr:
        return self.at_least(x, 0.0)

    # Across the lanes.

    def sum(self, x: Expr) -> Expr:
        """The sum of the lanes as a scalar, added as a tree."""
        return T.bind(self._raw("float32", "sum", x))

    def max(self, x: Expr) -> Expr:
        """The greatest lane as a scalar; NaN only if all are."""
        return T.bind(self._raw("float32", "max", x))

    def _poly(self, coefficients: Sequence[float], x: Expr) -> Expr:
        value = self.splat(coefficients[0])
        for c in coefficients[1:]:
            value = self.fma(value, x, self.splat(c))
        return T.bind(value)

    def _call(self, name: str, *args: Expr) -> Expr:
        return T.bind(self._raw(self.dtype, name, *args))

    def _words(self, name: str, *args: Expr) -> Expr:
        return T.bind(self._raw(f"int32x{self.lanes}", name, *args))

    def _raw(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.call_extern(dtype, f"moec_{name}_{self.lanes}", *args)


def rounded(v: Vector, x: Expr, dtype: str) -> Expr:
    """x as it would be read back from a buffer of TVM's `dtype`."""
    if dtype == "float32":
        return x
    return T.bind(T.call_extern(v.dtype, f"moec_round_{dtype}_{v.lanes}", x))


@dataclass(frozen=True)
class Softmax:
    """Functions on float32 vectors of `v.lanes` lanes, for softmax over many of them."""

    v: Vector

    def exp(self, x: Expr) -> Expr:
        """exp(x) for x <= 0, within 1e-7 (absolute); 0 below -88; NaN stays NaN."""
        return T.bind(self._call(self.v.dtype, "soft_exp", x))

    def top(self, x: Expr) -> Expr:
        """The greatest lane as a scalar; a NaN may or may not win."""
        return T.bind(self._call("float32", "top", x))

    def sums(self, vectors: Sequence[Expr]) -> Expr:
        """`lanes` vectors -> one vector of the sum of each, added as trees."""
        return T.bind(self._call(self.v.dtype, "sums", *vectors))

    def round_pairs(self, x: Expr) -> Expr:
        """The lanes rounded to bf16, as half as many int32; needs `target.bf16_dot`."""
        return self._call(f"int32x{self.v.lanes // 2}", "round_pairs", x)

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.call_extern(dtype, f"moec_{name}_{self.v.lanes}", *args)
