"""All LLVM functions that kernels of a target may call, and the text of those that a kernel calls.

Kernels call them by name (`T.call_extern(dtype, "moec_...", ...)`). The suffix of a name
distinguishes variants, as in `moec_fma_16` for 16 lanes. Most are always inlined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from moec.codegen.cpu.llvm.integer_text import integer_functions
from moec.codegen.cpu.llvm.masks import mask_functions
from moec.codegen.cpu.llvm.rank_text import rank_functions
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
