"""Float32 vectors rounded to a narrower float and back, as if they had been stored in between."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.llvm.frame import llvm_frame
from moec.codegen.cpu.llvm.vector_text import llvm_functions
from moec.codegen.cpu.vector import Vector


def functions(v: Vector) -> AbstractContextManager[object]:
    """The frame that `rounded` must be called in."""
    # With the functions it calls: a module's unused functions are gone before the next is read.
    text = llvm_functions(v.target) + "".join(
        _round(v.lanes, dtype) for dtype in ("bfloat16", "float16")
    )
    return llvm_frame(text)


def rounded(v: Vector, x: Expr, dtype: str) -> Expr:
    """x as it would be read back from a buffer of TVM's `dtype`."""
    if dtype == "float32":
        return x
    return T.bind(T.call_extern(v.dtype, f"moec_round_{dtype}_{v.lanes}", x))


def _round(n: int, dtype: str) -> str:
    """Stored and loaded: LLVM keeps it in registers. (TVM does not: it moves a scratch buffer
    of 16-bit floats to another name, and misses the addresses taken of it.)"""
    f = f"<{n} x float>"
    return f"""
define linkonce_odr {f} @moec_round_{dtype}_{n}({f} %x) alwaysinline {{
  %p = alloca <{n} x i16>
  %s = call i32 @moec_store_{dtype}_{n}(ptr %p, {f} %x)
  %r = call {f} @moec_load_{dtype}_{n}(ptr %p)
  ret {f} %r
}}
"""
