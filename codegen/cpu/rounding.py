"""Float32 vectors rounded to a narrower float and back, as if they had been stored in between."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.llvm.frame import llvm_frame
from moec.codegen.cpu.llvm.vector_text import llvm_functions, round_functions
from moec.codegen.cpu.vector import Vector


def functions(v: Vector) -> AbstractContextManager[object]:
    """The frame that `rounded` must be called in."""
    # With the functions it calls: a module's unused functions are gone before the next is read.
    return llvm_frame(llvm_functions(v.target) + round_functions(v.lanes))


def rounded(v: Vector, x: Expr, dtype: str) -> Expr:
    """x as it would be read back from a buffer of TVM's `dtype`."""
    if dtype == "float32":
        return x
    return T.bind(T.call_extern(v.dtype, f"moec_round_{dtype}_{v.lanes}", x))
