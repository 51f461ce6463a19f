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
