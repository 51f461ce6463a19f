"""All LLVM functions that kernels of a target may call, and the text of those that a kernel calls.

Kernels call them by name (`T.call_extern(dtype, "moec_...", ...)`). The suffix of a name
distinguishes variants, as in `moec_fma_16` for 16 lanes. Most are always inlined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from moec.codegen.cpu.llvm.constants import f32, splat
from moec.codegen.cpu.llvm.integer_text import integer_functions
from moec.codegen.cpu.llvm.masks import mask_functions
from moec.codegen.cpu.llvm.scalar_text import DIVIDE, scalar_functions
from moec.codegen.cpu.llvm.vector_text import round_functions, vector_functions
from moec.target.cpu import CpuTarget

PREFIX = "moec_"
"""The prefix of all functions defined here, unlike those of LLVM and C."""
_ENTITY = re.compile(r"^(?:declare .*|@.*|define (?s:.*?)^\})$", re.MULTILINE)
_NAME = re.compile(r"@([\w.]+)")


@dataclass(frozen=True)
class Library:
    """Declarations, globals and functions of LLVM: the text of each, by name."""

    entities: dict[str, str]

    @cached_property
    def references(self) -> dict[str, tuple[str, ...]]:
        """The other entities that each entity refers to."""
        return {
            name: tuple(dict.fromkeys(n for n in _NAME.findall(text) if n != name))
            for name, text in self.entities.items()
        }

    def text(self, names: Iterable[str]) -> str:
        """The functions of these names and all entities they refer to, in the library's order."""
        needed: set[str] = set()
        pending = list(names)
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                pending.extend(self.references[name])
        return "\n".join(text for name, text in self.entities.items() if name in needed)


@cache
def library(target: CpuTarget) -> Library:
    """The library of the kernels for `target`."""
    lanes = target.vector_lanes
    texts = (
        vector_functions(target),
        round_functions(lanes),
        scalar_functions(target),
        softmax_functions(target),
        rank_functions(lanes),
        integer_functions(target),
        mask_functions(target),
        DIVIDE,
    )
    return Library(dict(entity for text in texts for entity in _entities(text)))


def _entities(text: str) -> Iterator[tuple[str, str]]:
    for match in _ENTITY.finditer(text):
        first = _NAME.search(match.group())
        assert first is not None, match.group()
        yield first.group(1), match.group()


# ---- LLVM functions of routing: integer ranks of floats, and the first of the greatest ---


def rank_functions(n: int) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def const(value: int) -> str:
        return splat(n, "i32", value)

    # Adding 0.0 turns -0.0 into 0.0. Negative floats order backwards as integers: flip them.
    return f"""
declare i32 @llvm.vector.reduce.smax.v{n}i32({i})
declare i32 @llvm.vector.reduce.smin.v{n}i32({i})
define linkonce_odr {i} @moec_ranks_{n}({f} %a) alwaysinline {{
  %x = fadd {f} %a, zeroinitializer
  %b = bitcast {f} %x to {i}
  %s = ashr {i} %b, {const(31)}
  %m = and {i} %s, {const(2**31 - 1)}
  %k = xor {i} %b, %m
  %nan = fcmp uno {f} %a, %a
  %r = select <{n} x i1> %nan, {i} {const(2**31 - 1)}, {i} %k
  ret {i} %r
}}
define linkonce_odr i32 @moec_first_{n}({i} %ranks, {i} %ids) alwaysinline {{
  %top = call i32 @llvm.vector.reduce.smax.v{n}i32({i} %ranks)
  %t0 = insertelement {i} poison, i32 %top, i32 0
  %tops = shufflevector {i} %t0, {i} poison, {i} zeroinitializer
  %equal = icmp eq {i} %ranks, %tops
  %among = select <{n} x i1> %equal, {i} %ids, {i} {const(2**31 - 1)}
  %r = call i32 @llvm.vector.reduce.smin.v{n}i32({i} %among)
  ret i32 %r
}}
"""


# 2^r = 1 + r*q(r) on [-1/2, 1/2]: least squares, reweighted until the relative error was flat
# at 9.2e-8. The constant term is exactly 1, so that exp(0) is.
_EXP2 = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
_LOG2E = 1.4426950408889634
# Adding it puts the nearest integer, plus the bias of a float32 exponent, into the low bits.
_ROUND = float(3 << 22) + 127.0
# Here that integer is -127, whose biased exponent is 0: the power is the number zero.
_LOWEST = -88.0


def softmax_functions(target: CpuTarget) -> str:
    n = target.vector_lanes
    return _exp(n) + _top(n) + _sums(n) + (_ROUND_PAIRS if target.bf16_dot else "")


def _exp(n: int) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def const(value: float) -> str:
        return splat(n, "float", f32(value))

    def fma(name: str, a: str, b: str, c: str) -> str:
        return f"  {name} = call {f} @llvm.fmuladd.v{n}f32({f} {a}, {f} {b}, {f} {c})\n"

    log2e, rounder, lowest = const(_LOG2E), const(_ROUND), const(_LOWEST)
    text = f"""
declare {f} @llvm.fmuladd.v{n}f32({f}, {f}, {f})
define linkonce_odr {f} @moec_soft_exp_{n}({f} %a) alwaysinline {{
  %under = fcmp olt {f} %a, {lowest}
  %x = select <{n} x i1> %under, {f} {lowest}, {f} %a
"""
    text += fma("%s", "%x", log2e, rounder)
    text += f"  %minus_k = fsub {f} {rounder}, %s\n"
    text += fma("%r", "%x", log2e, "%minus_k")
    q = const(_EXP2[0])
    for step, c in enumerate(_EXP2[1:]):
        text += fma(f"%q{step}", q, "%r", const(c))
        q = f"%q{step}"
    return f"""{text}  %i = bitcast {f} %s to {i}
  %e = shl {i} %i, {splat(n, "i32", 23)}
  %p = bitcast {i} %e to {f}
  %y = fmul {f} {q}, %p
  ret {f} %y
}}"""


def _shuffle(name: str, f: str, a: str, b: str, lanes: Sequence[int]) -> str:
    mask = f"<{len(lanes)} x i32> <" + ", ".join(f"i32 {x}" for x in lanes) + ">"
    return f"  {name} = shufflevector {f} {a}, {f} {b}, {mask}\n"


def _top(n: int) -> str:
    """The greatest lane, by halving. LLVM's own reduction is slower, as it handles NaN."""
    f, text, width = f"<{n} x float>", "", n
    while width > 1:
        half = width // 2
        text += _shuffle(f"%s{half}", f, f"%a{width}", "poison", [(j + half) % n for j in range(n)])
        text += f"  %c{half} = fcmp ogt {f} %a{width}, %s{half}\n"
        text += f"  %a{half} = select <{n} x i1> %c{half}, {f} %a{width}, {f} %s{half}\n"
        width = half
    return f"""
define linkonce_odr float @moec_top_{n}({f} %a{n}) alwaysinline {{
{text}  %r = extractelement {f} %a1, i32 0
  ret float %r
}}
"""


def _sums(n: int) -> str:
    """Sums of n vectors: log2(n) rounds that halve two vectors each and join the halves."""
    f, text = f"<{n} x float>", ""
    names, step, width = [f"%a{j}" for j in range(n)], 0, n
    while width > 1:
        half, joined = width // 2, []
        # Each vector holds n/width sums of `width` parts; those of the other vector are appended.
        left = [b * width + j for b in range(2 * n // width) for j in range(half)]
        right = [x + half for x in left]
        for a, b in zip(names[::2], names[1::2], strict=True):
            text += _shuffle(f"%l{step}", f, a, b, left) + _shuffle(f"%r{step}", f, a, b, right)
            text += f"  %t{step} = fadd {f} %l{step}, %r{step}\n"
            joined.append(f"%t{step}")
            step += 1
        names, width = joined, half
    args = ", ".join(f"{f} %a{j}" for j in range(n))
    return f"""
define linkonce_odr {f} @moec_sums_{n}({args}) alwaysinline {{
{text}  ret {f} {names[0]}
}}
"""


_ROUND_PAIRS = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <8 x i32> @moec_round_pairs_16(<16 x float> %a) alwaysinline {
  %r = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %b = bitcast <16 x bfloat> %r to <8 x i32>
  ret <8 x i32> %b
}
"""
