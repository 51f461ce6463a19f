"""Functions whose result depends on numbers that Python computes from sizes, such as capacities."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import isqrt

import torch

Function = Callable[[torch.Tensor], torch.Tensor]


def first(x: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` rows as they are, zeros in the place of the others."""
    return x * (torch.arange(x.shape[0]) < count).to(x.dtype)[:, None]


def slots(x: torch.Tensor, count: int) -> torch.Tensor:
    """The sum over `count` rows of ones: the count as a shape."""
    return x + x.new_ones(count, x.shape[1]).sum(0)


def halves(x: torch.Tensor) -> torch.Tensor:
    count = x.size(0)
    if isinstance(count, int) and count > 10**6:
        raise ValueError("too many rows")
    return first(x, int(count / 2))


def accumulated(x: torch.Tensor) -> torch.Tensor:
    capacity = 0.25
    capacity += len(x) * 0.1
    capacity -= 1.5
    return first(x, max(int(capacity), 1))


RIGHT: dict[str, Function] = {
    # truncation
    "int(n*2.0/8)": lambda x: first(x, int(x.shape[0] * 2.0 / 8)),
    "int(1.25*n/6)": lambda x: first(x, int(1.25 * x.shape[0] / 6)),
    "int(n*0.3*0.7)": lambda x: first(x, int(x.shape[0] * 0.3 * 0.7)),
    "int(n*3*1.1)": lambda x: slots(x, int(x.shape[0] * 3 * 1.1)),
    "trunc(n*1.1)": lambda x: slots(x, math.trunc(x.shape[0] * 1.1)),
    "int(n*0.29/0.01)": lambda x: slots(x, int(x.shape[0] * 0.29 / 0.01)),
    "int(n*0.1-3)": lambda x: slots(x, int(x.shape[0] * 0.1 - 3) + 3),
    # ceil
    "ceil(n/8*1.1)": lambda x: first(x, math.ceil(x.shape[0] / 8 * 1.1)),
    "ceil(n*1.25/6)": lambda x: first(x, math.ceil(x.shape[0] * 1.25 / 6)),
    "ceil(n/6*1.25)": lambda x: first(x, math.ceil(x.shape[0] / 6 * 1.25)),
    "ceil(2*n*1.2/8)": lambda x: slots(x, math.ceil(2 * x.shape[0] * 1.2 / 8)),
    "-(-n//8)": lambda x: slots(x, -(-x.shape[0] // 8)),
    "ceil(len/4)": lambda x: first(x, math.ceil(len(x) / 4)),
    # floor
    "floor(n*0.7)": lambda x: first(x, math.floor(x.shape[0] * 0.7)),
    "floor(n/7)": lambda x: slots(x, math.floor(x.shape[0] / 7)),
    "floor(n*0.57*100)": lambda x: slots(x, math.floor(x.shape[0] * 0.57 * 100)),
    "n//7*2": lambda x: first(x, x.shape[0] // 7 * 2),
    "floor(1.0*n-0.5)": lambda x: first(x, math.floor(1.0 * x.shape[0] - 0.5)),
    # round
    "round(n/4)": lambda x: slots(x, round(x.shape[0] / 4)),
    "round(n*0.15)": lambda x: first(x, round(x.shape[0] * 0.15)),
    "round(n*0.5)": lambda x: first(x, round(x.shape[0] * 0.5)),
    "int(n*0.1+0.5)": lambda x: slots(x, int(x.shape[0] * 0.1 + 0.5)),
    "round(n/3*2)": lambda x: first(x, round(x.shape[0] / 3 * 2)),
    # min and max
    "min(n, int(n*2.0/8))": lambda x: first(x, min(x.shape[0], int(x.shape[0] * 2.0 / 8))),
    "max(4, int(1.25*n/8))": lambda x: slots(x, max(4, int(1.25 * x.shape[0] / 8))),
    "max(min(n, 16), 4)": lambda x: slots(x, max(min(x.shape[0], 16), 4)),
    "min(int(n*0.5), 12)": lambda x: first(x, min(int(x.shape[0] * 0.5), 12)),
    "max(n//3, 8)": lambda x: slots(x, max(x.shape[0] // 3, 8)),
    # true division
    "int(n/2)": halves,
    "int(float(n)/7*2)": lambda x: first(x, int(float(x.shape[0]) / 7 * 2)),
    "int(n/(n/4+1))": lambda x: slots(x, int(x.shape[0] / (x.shape[0] / 4 + 1))),
    "int(100.3/n)": lambda x: slots(x, int(100.3 / (x.shape[0] + 1))),
    "int(n/2*3/4)": lambda x: first(x, int(x.shape[0] / 2 * 3 / 4)),
    # modulo
    "n%5": lambda x: slots(x, x.shape[0] % 5),
    "(n+3)%7": lambda x: first(x, (x.shape[0] + 3) % 7),
    "-n%8": lambda x: slots(x, -x.shape[0] % 8),
    "n-n%4": lambda x: first(x, x.shape[0] - x.shape[0] % 4),
    "int(n%6*0.5)": lambda x: first(x, int(x.shape[0] % 6 * 0.5)),
    # int(len * float)
    "int(len*0.75)": lambda x: first(x, int(len(x) * 0.75)),
    "int(numel*0.1)": lambda x: slots(x, int(x.numel() * 0.1)),
    "int(size*1.2)": lambda x: slots(x, int(x.size(0) * 1.2)),
    "accumulated": accumulated,
    # roots and powers
    "isqrt(n)": lambda x: slots(x, math.isqrt(x.shape[0])),
    "int(sqrt(n))": lambda x: first(x, int(math.sqrt(x.shape[0]))),
    "ceil(sqrt(n))": lambda x: slots(x, math.ceil(math.sqrt(x.shape[0]))),
    "round(sqrt(n))": lambda x: slots(x, round(math.sqrt(x.shape[0]))),
    "int(sqrt(n)*1.5)": lambda x: slots(x, int(math.sqrt(x.shape[0]) * 1.5)),
    "int(n**0.5)": lambda x: first(x, int(x.shape[0] ** 0.5)),
    "int(n**0.75)": lambda x: slots(x, int(x.shape[0] ** 0.75)),
    "n**0.5//1": lambda x: first(x, x.shape[0] ** 0.5 // 1),
    "n<<2>>1": lambda x: slots(x, (x.shape[0] << 2) >> 1),
    "n//int(sqrt(n))": lambda x: slots(x, x.shape[0] // int(math.sqrt(x.shape[0]))),
    "n%int(sqrt(n))": lambda x: slots(x, x.shape[0] % int(math.sqrt(x.shape[0]))),
    "pow(isqrt(n),2)": lambda x: slots(x, int(math.pow(math.isqrt(x.shape[0]), 2))),
    "isqrt, imported": lambda x: slots(x, isqrt(x.shape[0])),
    # floats that are divided and rounded down
    "int(n*1.1//6)": lambda x: first(x, int(x.shape[0] * 1.1 // 6)),
    "int(n*0.1//1)": lambda x: slots(x, int(x.shape[0] * 0.1 // 1)),
    "int(n*1.3//2.0//3)": lambda x: slots(x, int(x.shape[0] * 1.3 // 2.0 // 3)),
    "int(len*float(text))": lambda x: first(x, int(len(x) * float("0.6"))),
}
"""What is symbolic, and equal to Python at every size."""

REFUSED: dict[str, tuple[Function, str]] = {
    "equality": (lambda x: x * 2 if x.shape[0] // 4 == 6 else x, r"floor\(T/4\) == 6"),
    "truncated equality": (
        lambda x: x * 2 if int(x.shape[0] * 2.0 / 8) == 6 else x,
        r"floor\(T/4\) == 6",
    ),
    "even": (lambda x: x * 2 if x.shape[0] % 2 == 0 else x, r"Mod\(T, 2\) == 0"),
    "odd or long": (
        lambda x: x * 2 if x.shape[0] % 5 != 3 else x,
        r"Mod\(T, 5\) != 3",
    ),
    "blocks": (
        lambda x: x + sum(x[0] for _ in range(x.shape[0] // 8)),
        r"floor\(T/8\) == 3",
    ),
    "root equal": (lambda x: x * 2 if math.isqrt(x.shape[0]) == 4 else x, r"isqrt\(T\) == 4"),
    "power of 3": (
        lambda x: slots(x, 3 ** (x.shape[0] // 16)),
        r"3 to the power of a size is no expression of sizes",
    ),
    "pairs": (lambda x: slots(x, math.comb(x.shape[0], 2)), r"would always be 24"),
    "greatest common divisor": (
        lambda x: first(x, math.gcd(x.shape[0], 8)),
        r"would always be 24|cannot be exported",
    ),
    "loop": (lambda x: sum(x[i] for i in range(x.shape[0])) + x, r"would always be 24"),
    "list": (lambda x: x * torch.tensor([1.0] * x.shape[0])[:, None], r"would always be 24"),
    "digits": (
        lambda x: first(x, int(round(x.shape[0] / 7, 1))),
        r"floats with|cannot be exported|would always be",
    ),
}
"""What would be wrong at other sizes, and the words that say so."""

UNSUPPORTED: dict[str, tuple[Function, str]] = {
    "log2": (lambda x: slots(x, int(math.log2(x.shape[0]))), r"would always be 24"),
    "log to a base": (lambda x: slots(x, int(math.log(x.shape[0], 3))), r"would always be 24"),
    "exp": (lambda x: slots(x, int(math.exp(x.shape[0] / 9))), r"would always be 24"),
    "bit_length": (lambda x: slots(x, x.shape[0].bit_length()), r"would always be 24"),
    "aligned": (lambda x: slots(x, (x.shape[0] + 7) & ~7), r"bits of a size"),
    "lowest bit": (lambda x: slots(x, x.shape[0] & -x.shape[0]), r"bits of a size"),
    "or": (lambda x: slots(x, x.shape[0] | 3), r"bits of a size"),
    "xor": (lambda x: slots(x, 5 ^ x.shape[0]), r"bits of a size"),
    "bits of two sizes": (lambda x: slots(x, x.shape[0] ^ (x.shape[0] // 2)), r"bits of a size"),
    "invert": (lambda x: slots(x, ~x.shape[0] + 500), r"bad operand type for unary ~"),
    "n // 3.5": (lambda x: first(x, int(x.shape[0] // 3.5)), r"for whole b only"),
    "n // 0.1": (lambda x: slots(x, int(x.shape[0] // 0.1) // 20), r"for whole b only"),
    "n / 6 // 0.1": (lambda x: slots(x, int(x.shape[0] / 6 // 0.1)), r"for whole b only"),
    "100 // (n / 7)": (lambda x: slots(x, int(100 // (x.shape[0] / 7))), r"for whole b only"),
    "n % 0.7": (lambda x: slots(x, int(x.shape[0] % 0.7 * 10)), r"a % b of floats of sizes"),
}
"""What no MoE module computes of a size: refused with the line, and the words that say so."""

BOUNDED: dict[str, tuple[Function, tuple[int, int | None]]] = {
    "n > 8": (lambda x: x * 2 if x.shape[0] > 8 else x, (9, None)),
    "n >= 8": (lambda x: x * 2 if len(x) >= 8 else x, (8, None)),
    "n < 100": (lambda x: x * 2 if x.shape[0] < 100 else x, (0, 99)),
    "int(n*2.0/8) > 5": (lambda x: x * 2 if int(x.shape[0] * 2.0 / 8) > 5 else x, (24, None)),
    "n*1.1 <= 55": (lambda x: x * 2 if x.shape[0] * 1.1 <= 55 else x, (0, 49)),
    "isqrt(n) >= 4": (lambda x: x * 2 if math.isqrt(x.shape[0]) >= 4 else x, (16, None)),
    "n // 2 or 1": (lambda x: first(x, x.shape[0] // 2 or 1), (2, None)),
    "int(n * 0.5) and": (lambda x: x * 2 if int(x.shape[0] * 0.5) and True else x, (2, None)),
    "16 < n <= 32": (lambda x: x * 2 if 16 < x.shape[0] <= 32 else x, (17, 32)),
}
"""What holds within bounds of the size, and these."""
