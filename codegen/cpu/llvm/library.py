"""All LLVM functions that kernels of a target may call, and the text of those that a kernel calls.

Kernels call them by name (`T.call_extern(dtype, "moec_...", ...)`). The suffix of a name
distinguishes variants, as in `moec_fma_16` for 16 lanes. Most are always inlined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from moec.codegen.cpu.llvm.constants import splat
from moec.codegen.cpu.llvm.integer_text import integer_functions
from moec.codegen.cpu.llvm.masks import mask_functions
from moec.codegen.cpu.llvm.scalar_text import DIVIDE, scalar_functions
from moec.codegen.cpu.llvm.softmax_text import softmax_functions
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
