"""The weights of one stack in several formats, expert by expert: opt-in and approximate.

    h = grouped.linear(x, ends, w, order)     h = grouped.mixed(x, ends,
      w: f32[8, H, D]                     ->        w.int8.codes, w.int8.scales,
                                                    w.int2_32.codes, w.int2_32.scales, order)
                                                <formats=("int8", "int2:32"),
                                                 experts=(0, 1, 1, 1, 1, 1, 1, 0)>
                                              w.int8.codes: u8[2, H, D]
                                              w.int2_32.codes: u8[6, H, D]

Experts differ in how often they are chosen and in what their errors do to the model, so that the
same bytes go further where they differ in bits. The experts keep their numbers: a kernel looks up
the format of each, and its place in the stack of that format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from moec.errors import NoMatch
from moec.ir.formats.notation import Format
from moec.ir.graph import Op, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder
from moec.passes.quantise.codes import Codes

Part: TypeAlias = "tuple[Format, tuple[int, ...]]"
"""A format and the numbers of its experts, ascending; none means all."""


@dataclass(frozen=True)
class ExpertFormats:
    """The formats of the experts of one stack: `others`, and `rest` for those not in them."""

    rest: Format
    others: tuple[Part, ...]

    def __str__(self) -> str:
        others = (f"{format} ({', '.join(map(str, e))})" for format, e in self.others)
        return f"{self.rest}, experts {', '.join(others)}"


AnyFormat: TypeAlias = "Format | ExpertFormats"


def parts_of(format: AnyFormat, count: int) -> tuple[Part, ...]:
    """The parts of a stack of `count` experts, none of them empty. Raises NoMatch."""
    if isinstance(format, Format):
        return ((format, ()),)
    numbers = [e for _, experts in format.others for e in experts]
    if numbers and max(numbers) >= count:
        raise NoMatch(f"expert {max(numbers)} has a format, and there are {count} experts")
    rest = tuple(sorted(set(range(count)) - set(numbers)))
    parts = [part for part in ((format.rest, rest), *format.others) if part[1]]
    return tuple(parts) if len(parts) > 1 else ((parts[0][0], ()),)


def mixable(formats: Sequence[Format]) -> list[Format]:
    """The formats that experts of one stack may have: those that round rows as the first does."""
    rounding = [format for format in formats if format.kind != "fp8"]
    return [format for format in rounding if format.row_bits == rounding[0].row_bits]


def mixed(op: Op, parts: Sequence[Part], codes: Codes, b: Builder) -> Sequence[Value]:
    """Emits the product with a stack for each part. Raises NoMatch where a format cannot be."""
    linear, values = GroupedLinear.of(op), list[Value]()
    bits, fitting = parts[0][0].row_bits, mixable([format for format, _ in parts])
    for format, experts in parts:
        if format not in fitting:
            raise NoMatch(f"experts of one stack round rows alike, and {format} does not")
        for matrix in linear.matrices:
            codes.check(matrix, format)
            values += codes.params(matrix, format, b, experts)
    numbers = {e: number for number, (_, experts) in enumerate(parts) for e in experts}
    attrs = {
        **op.attrs,
        "formats": tuple(str(format) for format, _ in parts),
        "experts": tuple(number for _, number in sorted(numbers.items())),
        **({"row_bits": bits} if bits != 8 else {}),
    }
    return b.emit("grouped.mixed", linear.storing(values), like=op, attrs=attrs, body=op.body)
