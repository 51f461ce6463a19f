"""Convolutions become linear layers over their receptive fields (im2col).

    y = aten.convolution(x[B, C, N], w[O, C, K], bias) <stride=s> <padding=p>
    ->
    rows = aten.constant_pad_nd(permute(x, 0 2 1)) <pad=(0, 0, p, p)>     [B, N + 2p, C]
    read = aten.cat(slice(rows, 0 ::s), ..., slice(rows, K - 1 ::s))      [B, N', K*C]
    y = permute(aten.linear(read, reshape(permute(w, 0 2 1)), bias))      [B, O, N']

Where the stride equals the kernel's size, as in patch embeddings, a reshape cuts the axes into
kernels, and each element is copied once. The rewrite of the weight is folded. The product runs on
the tiles of linear layers; a loop over positions would read each weight for each result.

A grouped convolution has few products per element and stays a loop. So does a causal convolution,
padded by the kernel's length - 1, whose state a decoder keeps (`passes/decode/kv_cache.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Attr, Op, Program, Ref, TensorType, Value
from moec.ir.sizes.dims import Dim, canonical, product
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass

MOST_TAPS = 32
"""The most positions of a kernel whose windows overlap: each position is a copy of the input."""


@dataclass(frozen=True)
class ExpandConvolutions(Pass):
    """Write a convolution without groups as a linear layer over the elements that its kernel
    covers."""

    name: ClassVar[str] = "expand-convolutions"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


@dataclass(frozen=True)
class _Convolution:
    """x[B, C, N...], w[O, C, K...] with one stride, padding and dilation for each spatial axis."""

    op: Op
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def sizes(self) -> tuple[Dim, ...]:
        """N' of the result."""
        return self.op.outputs[0].shape[2:]

    @property
    def side_by_side(self) -> bool:
        return self.stride == self.kernel and not any(self.padding) and set(self.dilation) == {1}


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    """Raises NoMatch for a kernel of too many positions."""
    if op.name != "aten.convolution.default" or op.attrs.get("transposed"):
        return None
    if op.attrs.get("groups", 1) != 1 or len(op.inputs[0].shape) < 3:
        return None
    if not all(isinstance(size, int) for size in op.inputs[1].shape[2:]):
        raise NoMatch("the sizes of its kernel vary: it stays a loop")
    convolution = _convolution(op)
    if _has_decode_state(convolution):
        return None
    taps = prod(convolution.kernel)
    if not convolution.side_by_side and taps > MOST_TAPS:
        raise NoMatch(
            f"its kernel has {taps} positions, and {MOST_TAPS} copies of the input are the most "
            "that a convolution becomes: it stays a loop"
        )
    x, weight, *rest = op.inputs
    outputs, width = weight.shape[0], product(weight.shape[1:])
    if convolution.side_by_side:
        read, matrix = _patches(x, convolution, b), weight
    else:
        read, matrix = _windows(x, convolution, b), _matrix_of_weight(weight, op, b)
    batch, sizes = x.shape[0], convolution.sizes
    rows = b.reshape(read, (product((batch, *sizes)), width), like=op)
    matrix = b.reshape(matrix, (outputs, width), like=op)
    types = [TensorType(op.outputs[0].dtype, (rows.shape[0], outputs))]
    (y,) = b.emit("aten.linear.default", [rows, matrix, *rest], types, like=op)
    y = b.reshape(y, (batch, *sizes, outputs), like=op)
    return (b.permute(y, _channels_first(convolution.rank), like=op),)


def _convolution(op: Op) -> _Convolution:
    kernel = tuple(int(size) for size in op.inputs[1].shape[2:])

    def per_axis(name: str, default: int) -> tuple[int, ...]:
        value: Any = op.attrs.get(name, default)
        values = tuple(value) if isinstance(value, tuple) else (value,)
        return values * len(kernel) if len(values) == 1 else values

    return _Convolution(
        op, kernel, per_axis("stride", 1), per_axis("padding", 0), per_axis("dilation", 1)
    )


def _has_decode_state(c: _Convolution) -> bool:
    """Whether it is causal once its end is cut off, so that decoding keeps a state for it."""
    ends = c.rank == 1 and (c.stride, c.dilation) == ((1,), (1,))
    return ends and c.padding == (c.kernel[0] - 1,) != (0,)


def _channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, 2 + rank), 1)


def _channels_first(rank: int) -> tuple[int, ...]:
    return (0, 1 + rank, *range(1, 1 + rank))


def _matrix_of_weight(weight: Value, op: Op, b: Builder) -> Value:
    """w[O, C, K...] as [O, K..., C], in the order in which `_covered` joins."""
    return b.permute(weight, _channels_last(len(weight.shape) - 2), like=op)


def _patches(x: Value, c: _Convolution, b: Builder) -> Value:
    """x[B, C, N...] as [B, N'..., C, K...]: the axes cut into kernels, the rest left out."""
    parts: list[Dim] = [*x.shape[:2]]
    for axis, (count, size) in enumerate(zip(c.sizes, c.kernel, strict=True), 2):
        x = _slice(x, axis, 0, 1, canonical(count * size), c.op, b)
        parts += [count, size]
    x = b.reshape(x, parts, like=c.op)
    counts = range(2, 2 + 2 * c.rank, 2)
    order = (0, *counts, 1, *(axis + 1 for axis in counts))
    return b.permute(x, order, like=c.op)


def _windows(x: Value, c: _Convolution, b: Builder) -> Value:
    """x[B, C, N...] as [B, N'..., K * C]: for each result, the elements that its kernel covers."""
    rows = b.permute(x, _channels_last(c.rank), like=c.op)
    rows = _pad(rows, c, b)
    pieces = [_tap(rows, tap, c, b) for tap in itertools.product(*map(range, c.kernel))]
    if len(pieces) == 1:
        return pieces[0]
    joined = TensorType(x.dtype, (x.shape[0], *c.sizes, canonical(x.shape[1] * len(pieces))))
    attrs: dict[str, Attr] = {"tensors": tuple(map(Ref, range(len(pieces)))), "dim": 1 + c.rank}
    return b.emit("aten.cat.default", pieces, [joined], like=c.op, attrs=attrs)[0]


def _pad(rows: Value, c: _Convolution, b: Builder) -> Value:
    """rows[B, N..., C] with zeros before and after each spatial axis."""
    if not any(c.padding):
        return rows
    batch, *sizes, channels = rows.shape
    shape = [canonical(size + 2 * pad) for size, pad in zip(sizes, c.padding, strict=True)]
    pad = (0, 0, *(side for pad in reversed(c.padding) for side in (pad, pad)))
    target = TensorType(rows.dtype, (batch, *shape, channels))
    attrs: dict[str, Attr] = {"pad": pad, "value": 0}
    return b.emit("aten.constant_pad_nd.default", [rows], [target], like=c.op, attrs=attrs)[0]


def _tap(rows: Value, tap: tuple[int, ...], c: _Convolution, b: Builder) -> Value:
    """The elements that one position of the kernel reads, for all results: [B, N'..., C]."""
    for axis, position in enumerate(tap):
        start, step = position * c.dilation[axis], c.stride[axis]
        rows = _slice(rows, 1 + axis, start, step, c.sizes[axis], c.op, b)
    return rows


def _slice(x: Value, axis: int, start: int, step: int, size: Dim, op: Op, b: Builder) -> Value:
    """Every `step`-th element of an axis from `start` on, `size` in all; x itself if that is x."""
    if (start, step, size) == (0, 1, x.shape[axis]):
        return x
    target = TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :]))
    end = canonical(start + (size - 1) * step + 1)
    attrs: dict[str, Attr] = {"dim": axis, "start": start, "end": end, "step": step}
    return b.emit("aten.slice.Tensor", [x], [target], like=op, attrs=attrs)[0]
