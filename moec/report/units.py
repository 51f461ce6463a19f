"""Numbers with units, rounded for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """1 layer, 2 layers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def count(number: float) -> str:
    """1.2 M for 1234567."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return (
                f"{number / size:.3g} {unit}"
                if number < 999 * size
                else f"{number / size:.0f} {unit}"
            )
    return str(int(number))


def size(number: float) -> str:
    """1.2 MB for 1234567 bytes."""
    for unit, unit_size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= unit_size:
            return f"{number / unit_size:.1f} {unit}"
    return f"{int(number)} bytes"


def seconds(number: float) -> str:
    return f"{number:.2f} s" if number < 9.995 else f"{number:.0f} s"
