"""Constants in the syntax of LLVM."""

from __future__ import annotations

import struct


def f32(value: float) -> str:
    """A float32 constant: the bits of the equal double."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"


def splat(n: int, kind: str, value: str | int) -> str:
    """`value` in all n lanes."""
    return "<" + ", ".join([f"{kind} {value}"] * n) + ">"


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


TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
