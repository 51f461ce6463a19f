"""Sums of two products of 16-bit integers, in a form for which LLVM selects an instruction."""

from __future__ import annotations


def pair_sums(n: int, name: str, a: str, b: str) -> str:
    """%name = the n sums of adjacent products of a * b, in 32 bits; a and b have 2n integers.

    If one of them is a constant, LLVM simplifies this to separate products.
    """
    h, w, i = f"<{2 * n} x i16>", f"<{2 * n} x i32>", f"<{n} x i32>"
    even, odd = (
        "<" + ", ".join(f"i32 {2 * j + side}" for j in range(n)) + ">" for side in range(2)
    )
    return f"""
  %{name}a = sext {h} {a} to {w}
  %{name}b = sext {h} {b} to {w}
  %{name}p = mul {w} %{name}a, %{name}b
  %{name}e = shufflevector {w} %{name}p, {w} poison, {i} {even}
  %{name}o = shufflevector {w} %{name}p, {w} poison, {i} {odd}
  %{name} = add {i} %{name}e, %{name}o"""
