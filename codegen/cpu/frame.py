"""The frame of a kernel: its name, its arguments, and the resulting function.

    with kernel("twice", target) as frame:
        rows = T.int64()
        x, y = (argument(name, (rows,), "float32") for name in "xy")
        with T.serial(0, rows) as i:
            T.buffer_store(y, x[i] * T.float32(2), [i])
    return frame.function

LLVM functions that the loops call by name (llvm/library.py) are imported when the frame ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr, StringImm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import AttrStmt, Buffer, PrimFunc
from tvm_ffi.structural import structural_walk

from moec.codegen.cpu.llvm.library import PREFIX, library
from moec.errors import IRError
from moec.target.cpu import CpuTarget

IMPORT = "pragma_import_llvm"
"""TVM's name of the attribute whose text is linked to the function around it."""


class KernelFrame:
    """`function` is set when the frame ends."""

    function: PrimFunc


@contextmanager
def kernel(
    name: str, target: CpuTarget | None = None, *, s_tir: bool = False
) -> Iterator[KernelFrame]:
    """The frame in which arguments are declared and loops are written.

    No two arguments may share memory, unless neither is written. Raises IRError at its end if the
    loops call a function of moec that `target` does not have, or call one without a target.
    `s_tir`: the loops bind threads of a GPU, and `target` is the CPU that launches them.
    """
    frame = KernelFrame()
    with IRBuilder() as builder, T.prim_func(s_tir=s_tir):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield frame
    frame.function = _importing(builder.get(), target)


def _importing(function: PrimFunc, target: CpuTarget | None) -> PrimFunc:
    """The function with the text of all functions of moec that it calls."""
    calls: set[str] = set()

    def visit(string: StringImm) -> None:
        if string.value.startswith(PREFIX):
            calls.add(str(string.value))

    structural_walk(function.body, (StringImm, visit))
    if not calls:
        return function
    name = function.attrs["global_symbol"]
    if target is None:
        raise IRError(f"{name} calls {', '.join(sorted(calls))}, and has no target")
    functions = library(target)
    if missing := sorted(calls - functions.entities.keys()):
        raise IRError(f"{name} calls {', '.join(missing)}, which {target.name} does not have")
    text = StringImm(functions.text(calls))
    return function.with_body(AttrStmt(tirx.const(0, "int32"), IMPORT, text, function.body))


def argument(name: str, shape: Sequence[Expr | int], dtype: str) -> Buffer:
    """The next argument of the kernel whose frame is open."""
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)
