"""The frame of a kernel: its name, its arguments, and the function that comes of it.

with kernel("twice") as frame:
    rows = T.int64()
    x, y = (argument(name, (rows,), "float32") for name in "xy")
    with T.serial(0, rows) as i:
        T.buffer_store(y, x[i] * T.float32(2), [i])
return frame.function
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc


class Frame:
    """`function` is there once the frame has ended."""

    function: PrimFunc


@contextmanager
def kernel(name: str) -> Iterator[Frame]:
    """The frame in which arguments are declared and loops are written.

    No two arguments may share memory, unless neither is written.
    """
    frame = Frame()
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            yield frame
    frame.function = builder.get()


def argument(name: str, shape: Sequence[Expr | int], dtype: str) -> Buffer:
    """The next argument of the kernel whose frame is open."""
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)
