"""The inputs of an op by name.

    "x, weight, bias?biased"          bias exists if the attribute `biased` is set
    "x, weight?"                      weight exists if an input is left for it
    "x, constants?kinds:constant"     constants exists if the tuple `kinds` contains "constant"
    "rows, biases*matrices?biased"    biases has as many as the attribute `matrices`, if `biased`
    "x, ends, matrices*, order?gather"  matrices has all inputs that no other name takes

Names are in the order of the inputs. Type rules, references, passes and kernels read the same
signature, so that none of them decodes positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moec.errors import IRError
from moec.ir.graph import Op

_NAME = re.compile(
    r"(?P<name>\w+)(?P<many>\*(?P<count>\w*))?(?P<may>\?(?P<flag>\w*)(:(?P<word>\w+))?)?"
)


@dataclass(frozen=True)
class Operand:
    """One name of a signature: one input, or with `many` a tuple of inputs."""

    name: str
    many: bool
    count: str
    optional: bool
    flag: str
    word: str

    def number(self, attrs: Mapping[str, Any]) -> int | None:
        """The number of inputs it takes, from the attributes; None if they do not determine it."""
        if self.flag:
            attr = attrs.get(self.flag)
            if not (self.word in (attr or ()) if self.word else attr):
                return 0
        if self.many:
            return int(attrs[self.count]) if self.count else None
        return None if self.optional and not self.flag else 1


@dataclass(frozen=True)
class Signature:
    """The names of an op's inputs, in their order."""

    operands: tuple[Operand, ...]

    def bind(self, op: Op, inputs: Sequence[Any], attrs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs (values, or their tensors) by name; None for an absent one.

        Raises IRError where there are fewer or more inputs than the attributes of `op` require.
        """
        numbers = [operand.number(attrs) for operand in self.operands]
        left = len(inputs) - sum(number or 0 for number in numbers)
        bound: dict[str, Any] = {}
        position = 0
        for operand, number in zip(self.operands, numbers, strict=True):
            if number is None:
                number = max(left if operand.many else min(left, 1), 0)
                left -= number
            part = tuple(inputs[position : position + number])
            if len(part) < number:
                raise IRError(f"{op}: the input {operand.name} is missing")
            position += number
            bound[operand.name] = part if operand.many else next(iter(part), None)
        if position < len(inputs):
            raise IRError(f"{op}: has inputs that no attribute names")
        return bound


@cache
def signature(text: str) -> Signature:
    """Parse a signature (the syntax is at the top of this file)."""
    operands = []
    for part in filter(None, text.split(", ")):
        match = _NAME.fullmatch(part)
        assert match is not None, part
        name, flag, word, count = (match[key] or "" for key in ("name", "flag", "word", "count"))
        operands.append(Operand(name, bool(match["many"]), count, bool(match["may"]), flag, word))
    return Signature(tuple(operands))
