"""Definitions of moec's ops, and the table in which an op is looked up by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

from moec.errors import IRError
from moec.ir.graph import Graph, Op, TensorType

# The inputs of an op by name.
#
#     "x, weight, bias?biased"          bias exists if the attribute `biased` is set
#     "x, weight?"                      weight exists if an input is left for it
#     "x, constants?kinds:constant"     constants exists if the tuple `kinds` contains "constant"
#     "rows, biases*matrices?biased"    biases has as many as the attribute `matrices`, if `biased`
#     "x, ends, matrices*, order?gather"  matrices has all inputs that no other name takes
#
# Names are in the order of the inputs. Type rules, references, passes and kernels read the same
# signature, so that none of them decodes positions.
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


Runner = Callable[[Graph, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
Reference = Callable[[Op, Sequence[torch.Tensor], Mapping[str, Any], Runner], Any]


@dataclass(frozen=True)
class OpDef:
    """The definition of an op: its type rule, its meaning in eager PyTorch, the names of its
    inputs, and whether it treats tokens (rows) independently.

    `infer(op)` returns the types of the outputs from inputs, attrs and body, and raises IRError
    where they break the op's rules. `reference(op, tensors, attrs, run)` computes the outputs;
    the sizes in `attrs` are bound, and `run(body, tensors)` evaluates a body.
    """

    infer: Callable[[Op], tuple[TensorType, ...]]
    reference: Reference
    signature: Signature
    tokenwise: bool = False


OPS: dict[str, OpDef] = {}


def defop(
    name: str,
    infer: Callable[[Op], tuple[TensorType, ...]],
    inputs: str,
    *,
    tokenwise: bool = False,
) -> Callable[..., Reference]:
    """Registers the decorated function as the meaning of an op. `inputs` is its signature
    (moec.ir.opdef); `tokenwise`: the results of a token do not depend on other tokens, except
    for the order of sorted rows."""

    def register(reference: Reference) -> Reference:
        OPS[name] = OpDef(infer, reference, signature(inputs), tokenwise)
        return reference

    return register


def inputs_of(op: Op) -> dict[str, Any]:
    """The inputs of an op of moec by name: Values, tuples of Values, or None if absent.

    Raises IRError where inputs and attributes do not match.
    """
    return OPS[op.name].signature.bind(op, op.inputs, op.attrs)


def tensors_of(
    name: str, op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> dict[str, Any]:
    """The tensors of a reference by the input names of op `name`."""
    return OPS[name].signature.bind(op, tensors, attrs)


def require(op: Op, rule: bool, message: str) -> None:
    if not rule:
        raise IRError(f"{op}: {message}")


def integer(op: Op, name: str) -> int:
    value = op.attrs.get(name)
    require(op, isinstance(value, int) and not isinstance(value, bool), f"{name} is not an int")
    return cast(int, value)
