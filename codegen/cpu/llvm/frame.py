"""LLVM functions that a kernel calls by name, as text of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tvm import tirx
from tvm.script.ir_builder import tirx as T

IMPORT = "pragma_import_llvm"
"""TVM's name of the attribute."""


def llvm_frame(text: str) -> AbstractContextManager[object]:
    """The frame that calls of the functions in `text` must be made in."""
    frame: AbstractContextManager[object] = T.attr(tirx.const(0, "int32"), IMPORT, text)
    return frame
