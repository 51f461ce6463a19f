"""Rounds float32 vectors to a narrower float and back, as if they had been stored and loaded."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.vector import Vector


def rounded(v: Vector, x: Expr, dtype: str) -> Expr:
    """x as it would be read back from a buffer of TVM's `dtype`."""
    if dtype == "float32":
        return x
    return T.bind(T.call_extern(v.dtype, f"moec_round_{dtype}_{v.lanes}", x))
