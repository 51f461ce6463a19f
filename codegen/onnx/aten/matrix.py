"""Products with matrices."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import torch

from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.writer import NodeWriter, Weight
from moec.ir.graph import Value


def transposed(w: NodeWriter, weight: Value) -> str:
    """weight.T for a MatMul: stored transposed, unless another op reads the weight itself."""
    only = all(
        op.name in ("aten.linear.default", "moe.gate") and weight is op.inputs[1]
        for op in w.graph.readers.get(weight, ())
    )
    if not w.is_param(weight) or not only:
        return w("Transpose", w.read(weight), perm=[1, 0])
    rows, columns = (int(d) for d in weight.shape)
    stored = Weight((weight.name,), weight.dtype, (columns, rows), lambda *tensors: tensors[0].T)
    return w.weight(f"{weight.name}.T", stored)


def of_experts(w: NodeWriter, stacks: Sequence[Value]) -> list[str]:
    """For each expert e, the rows of all stack[e] concatenated: [sum of N, K].T from stacks [E, N,
    K], for a MatMul, or [sum of N] from stacks [E, N]."""
    return [_joined(w, stacks, e) for e in range(int(str(stacks[0].shape[0])))]


def _joined(w: NodeWriter, stacks: Sequence[Value], expert: int) -> str:
    turned = len(stacks[0].shape) == 3
    if not all(w.is_param(stack) for stack in stacks):
        rows = [w("Gather", w.read(stack), w.constant(expert), axis=0) for stack in stacks]
        row = rows[0] if len(rows) == 1 else w("Concat", *rows, axis=0)
        return w("Transpose", row, perm=[1, 0]) if turned else row
    names = [stack.name for stack in stacks]
    prefix = commonprefix(names).rstrip("._") or names[0]  # noqa: RUF071 - names, not paths
    size = sum(int(str(stack.shape[1])) for stack in stacks)
    shape = (int(str(stacks[0].shape[2])), size) if turned else (size,)

    def make(*tensors: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([tensor[expert] for tensor in tensors])
        return rows.T if turned else rows

    stored = Weight(tuple(names), stacks[0].dtype, shape, make)
    return w.weight(f"{prefix}.{expert}{'.T' if turned else ''}", stored)


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
