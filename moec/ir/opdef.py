"""What an op of moec is, and the table that every op of a graph is looked up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.errors import IRError
from moec.ir.graph import Graph, Op, TensorType

Runner = Callable[[Graph, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
Reference = Callable[[Op, Sequence[torch.Tensor], Mapping[str, Any], Runner], Any]


@dataclass(frozen=True)
class OpDef:
    """A whole op: its type rule, and its meaning as eager PyTorch.

    `infer(op)` gives the types of the outputs from inputs, attrs and body, and raises IRError
    where they break the op's rules. `reference(op, tensors, attrs, run)` computes them; `attrs`
    has its sizes bound, `run(body, tensors)` evaluates a body.
    """

    infer: Callable[[Op], tuple[TensorType, ...]]
    reference: Reference


OPS: dict[str, OpDef] = {}


def defop(name: str, infer: Callable[[Op], tuple[TensorType, ...]]) -> Callable[..., Reference]:
    def register(reference: Reference) -> Reference:
        OPS[name] = OpDef(infer, reference)
        return reference

    return register


def require(op: Op, rule: bool, message: str) -> None:
    if not rule:
        raise IRError(f"{op}: {message}")


def integer(op: Op, name: str) -> int:
    value = op.attrs.get(name)
    require(op, isinstance(value, int) and not isinstance(value, bool), f"{name} is not an int")
    return cast(int, value)
