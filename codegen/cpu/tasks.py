"""Numbers of parallel tasks, split into the parts they stand for."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

_DIVIDE = """
define linkonce_odr i64 @moec_quotient(i64 %a, i64 %b) alwaysinline {
  %none = icmp slt i64 %b, 1
  %c = select i1 %none, i64 1, i64 %b
  %r = udiv i64 %a, %c
  ret i64 %r
}
"""


def functions() -> AbstractContextManager[object]:
    """The frame that `divide` must be called in."""
    return T.attr(tirx.const(0, "int32"), "pragma_import_llvm", _DIVIDE)  # type: ignore[no-any-return]


def divide(task: Expr, parts: Expr) -> tuple[Expr, Expr]:
    """task // parts, task % parts; where `parts` is 0 there is no task.

    The division is hidden from TVM: it would conclude from `task` having a range that `parts`
    is not 0, shrink scratch buffers by such reasoning, and then divide by 0 for their size.
    """
    quotient = T.bind(T.call_extern("int64", "moec_quotient", task, parts))
    return quotient, T.bind(task - quotient * parts)
