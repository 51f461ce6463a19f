"""Definitions of moec's ops, and the table in which an op is looked up by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.errors import IRError
from moec.ir.graph import Graph, Op, TensorType
from moec.ir.signature import Signature, signature

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
    (moec.ir.signature); `tokenwise`: the results of a token do not depend on other tokens, except
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
