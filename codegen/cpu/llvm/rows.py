"""LLVM functions for unpacked matrices, in PyTorch's layout: pairs of rows, and sums of lanes.

Two consecutive bf16 elements of a row are one word, the first in its low half. Names and inlining
are as in vector_text.py.
"""

from __future__ import annotations

from moec.codegen.cpu.llvm.constants import splat


def row_functions(n: int) -> str:
    return _words(n) + _sums(n)


def _words(n: int) -> str:
    """Words of two rows -> the pairs of even and of odd columns, one element of each row."""
    i, h, f = f"<{n} x i32>", f"<{n} x i16>", f"<{n} x float>"
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
define linkonce_odr {i} @moec_odd_{n}({i} %a, {i} %b) alwaysinline {{
  %l = lshr {i} %a, {splat(n, "i32", 16)}
  %h = and {i} %b, {splat(n, "i32", -65536)}
  %r = or {i} %l, %h
  ret {i} %r
}}
define linkonce_odr {i} @moec_halves_{n}(ptr %p) alwaysinline {{
  %e = load {h}, ptr %p, align 2
  %w = zext {h} %e to {i}
  ret {i} %w
}}
define linkonce_odr i32 @moec_store_columns_{n}(ptr %p, {f} %even, {f} %odd) alwaysinline {{
  %s = alloca {i}, align 64
  %q = getelementptr i8, ptr %s, i64 {2 * n}
  %none = call i32 @moec_store_bfloat16_{n}(ptr %s, {f} %even)
  %nor = call i32 @moec_store_bfloat16_{n}(ptr %q, {f} %odd)
  %e = load {h}, ptr %s, align 2
  %o = load {h}, ptr %q, align 2
  %l = zext {h} %e to {i}
  %u = zext {h} %o to {i}
  %h = shl {i} %u, {splat(n, "i32", 16)}
  %r = or {i} %l, %h
  store {i} %r, ptr %p, align 2
  ret i32 0
}}"""


def _sums(n: int) -> str:
    """Four vectors -> four consecutive floats: the sum of the lanes of each, added as a tree."""
    f = f"<{n} x float>"
    lines = []

    def halved(name: str, one: str, other: str, size: int) -> str:
        """The sums of adjacent lanes of two vectors, half as many for each."""
        kind, mask = f"<{size} x float>", f"<{size} x i32>"
        for parity in range(2):
            order = ", ".join(f"i32 {2 * lane + parity}" for lane in range(size))
            lines.append(
                f"  {name}_{parity} = shufflevector {kind} {one}, {kind} {other}, {mask} <{order}>"
            )
        lines.append(f"  {name} = fadd {kind} {name}_0, {name}_1")
        return name

    value = halved("%abcd", halved("%ab", "%a", "%b", n), halved("%cd", "%c", "%d", n), n)
    size = n
    while size > 4:
        kind, size = f"<{size} x float>", size // 2
        for parity in range(2):
            order = ", ".join(f"i32 {2 * lane + parity}" for lane in range(size))
            lines.append(
                f"  %f{size}_{parity} = shufflevector {kind} {value}, {kind} poison, "
                f"<{size} x i32> <{order}>"
            )
        lines.append(f"  %f{size} = fadd <{size} x float> %f{size}_0, %f{size}_1")
        value = f"%f{size}"
    body = "\n".join(lines)
    return f"""
define linkonce_odr i32 @moec_store_sums_{n}(ptr %p, {f} %a, {f} %b, {f} %c, {f} %d) alwaysinline {{
{body}
  store <4 x float> {value}, ptr %p, align 4
  ret i32 0
}}"""
