"""LLVM functions for unpacked matrices, in PyTorch's layout: pairs of rows.

Two consecutive bf16 elements of a row are one word, the first in its low half. Names and inlining
are as in vector_text.py.
"""

from __future__ import annotations

from moec.codegen.cpu.llvm.constants import splat


def row_functions(n: int) -> str:
    """Words of two rows -> the pairs of even columns, one element of each row."""
    i, h = f"<{n} x i32>", f"<{n} x i16>"
    return f"""
define linkonce_odr {i} @moec_words_{n}(ptr %p) alwaysinline {{
  %w = load {i}, ptr %p, align 2
  ret {i} %w
}}
define linkonce_odr {i} @moec_even_{n}({i} %a, {i} %b) alwaysinline {{
  %l = and {i} %a, {splat(n, "i32", 0xFFFF)}
  %h = shl {i} %b, {splat(n, "i32", 16)}
  %r = or {i} %l, %h
  ret {i} %r
}}
define linkonce_odr {i} @moec_halves_{n}(ptr %p) alwaysinline {{
  %e = load {h}, ptr %p, align 2
  %w = zext {h} %e to {i}
  ret {i} %w
}}"""
