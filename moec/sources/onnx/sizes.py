"""Values that nodes compute of sizes: integers of Python, which exports keep symbolic.

A scalar is an `int` or torch's symbolic one, and a list has one axis. Small constants of int64 are
such values too; where an operator needs a tensor, it becomes one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

Size: TypeAlias = Any
"""An `int`, or a `torch.SymInt`."""
Value: TypeAlias = "Tensor | Size | list[Size] | None"


def is_sizes(value: Value) -> bool:
    return isinstance(value, int | torch.SymInt | list)


def is_number(size: Size) -> bool:
    """Whether a size is the same in all calls."""
    return not isinstance(size, torch.SymInt)


def sizes(value: Value) -> list[Size]:
    """A value as a list of sizes. Raises ValueError where data decide it."""
    if isinstance(value, list):
        return value
    if isinstance(value, int | torch.SymInt):
        return [value]
    raise ValueError("data decide a size or an axis")


def size(value: Value) -> Size:
    (only,) = sizes(value)
    return only


def tensor(value: Value) -> Tensor:
    """A value as a tensor; sizes are int64."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list):
        return torch.stack([tensor(each) for each in value]) if value else torch.zeros(0).long()
    return torch.full((), cast(int, value), dtype=torch.int64)


def _divide(a: Size, b: Size) -> Size:
    return a // b  # sizes are not negative, where ONNX rounds towards 0


_SYMBOLIC: Any = torch
ARITHMETIC: dict[str, Callable[[Size, Size], Size]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "Mod": operator.mod,
    "Equal": operator.eq,
    "Max": lambda a, b: _SYMBOLIC.sym_max(a, b),
    "Min": lambda a, b: _SYMBOLIC.sym_min(a, b),
}


def compute(name: str, values: Sequence[Value]) -> Value:
    """An elementwise operator on sizes."""
    count = max((len(value) for value in values if isinstance(value, list)), default=0)
    if not any(isinstance(value, list) for value in values):
        return ARITHMETIC[name](*values)
    columns = [sizes(value) * (count if len(sizes(value)) == 1 else 1) for value in values]
    return [ARITHMETIC[name](*row) for row in zip(*columns, strict=True)]
