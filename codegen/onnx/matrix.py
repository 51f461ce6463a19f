"""Products with matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.writer import Weight, Writer
from moec.ir import Value


def transposed(w: Writer, weight: Value) -> str:
    """weight.T for a MatMul: stored so, where nothing reads the weight as it is."""
    only = all(
        op.name in ("aten.linear.default", "moe.gate") and weight is op.inputs[1]
        for op in w.graph.readers.get(weight, ())
    )
    if not w.is_param(weight) or not only:
        return w("Transpose", w.read(weight), perm=[1, 0])
    rows, columns = (int(d) for d in weight.shape)
    stored = Weight((weight.name,), weight.dtype, (columns, rows), lambda *tensors: tensors[0].T)
    return w.weight(f"{weight.name}.T", stored)


def matrices_of(w: Writer, stack: Value) -> list[str]:
    """stack[e].T of a stack [E, N, K], one for each expert."""
    experts = int(stack.shape[0])
    return [_slice(w, stack, e, turned=True) for e in range(experts)]


def rows_of(w: Writer, stack: Value) -> list[str]:
    """stack[e] of a stack [E, N], one for each expert."""
    return [_slice(w, stack, e, turned=False) for e in range(int(stack.shape[0]))]


def _slice(w: Writer, stack: Value, expert: int, turned: bool) -> str:
    if not w.is_param(stack):
        row = w("Gather", w.read(stack), w.constant(expert), axis=0)
        return w("Transpose", row, perm=[1, 0]) if turned else row
    shape = tuple(int(d) for d in stack.shape[1:])

    def make(*tensors: torch.Tensor) -> torch.Tensor:
        return tensors[0][expert].T if turned else tensors[0][expert]

    stored = Weight((stack.name,), stack.dtype, shape[::-1] if turned else shape, make)
    return w.weight(f"{stack.name}.{expert}{'.T' if turned else ''}", stored)


@build("linear")
def linear(c: Call) -> str:
    x: Value = c["input"]
    product = c.w("MatMul", c.read(x), transposed(c.w, c["weight"]))
    return product if c["bias"] is None else c.w("Add", product, c.read(c["bias"]))


@build("mm", "bmm", "matmul", "mv", "dot")
def matmul(c: Call) -> str:
    a, b = c.op.inputs
    return c.w("MatMul", c.read(a), c.read(b))


def _scaled(c: Call, x: str, factor: Any) -> str:
    return x if factor == 1 else c.w("Mul", x, c.w.constant(factor, c.out.dtype))


@build("addmm", "baddbmm")
def addmm(c: Call) -> str:
    a, b = _pair(c)
    product = _scaled(c, c.w("MatMul", c.read(a), c.read(b)), c["alpha"])
    return c.w("Add", product, _scaled(c, c.read(c["self"]), c["beta"]))


def _pair(c: Call) -> Sequence[Value]:
    names = ("mat1", "mat2") if "addmm" in c.op.name else ("batch1", "batch2")
    return [c[name] for name in names]
