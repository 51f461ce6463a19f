"""Rules for ops along an axis of masked rows, whose result needs no places of rows.

The rows outside of the mask get the neutral element of the op: 0 in a sum, -inf in a softmax. A
mean or a variance divides by the number of rows in the mask. An extreme needs a row that is always
there: it fails where no row is in the mask, as an expert without tokens has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from moec.capture.speculate.masked.values import Rows, Unmasked
from moec.torch_private import schema_of

Rule = Callable[..., Any]


def axes_of(node: Any, x: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The axes along which an op of `x` works."""
    names = [argument.name for argument in schema_of(node.target).arguments]
    dim = {**dict(zip(names[1:], args, strict=False)), **kwargs}.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.tensor.ndim))
    return [axis % x.tensor.ndim for axis in dims]


def _if_along_rows(rule: Rule) -> Rule:
    """`rule` for an op along the axis of masked rows; NotImplemented for any other."""

    def along_rows(node: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Rows) or x.axis not in axes_of(node, x, args, kwargs):
            return NotImplemented
        return rule(node, x, *args, **kwargs)

    return along_rows


def _all_rows(neutral: Any, node: Any, x: Rows, *args: Any, **kwargs: Any) -> Any:
    """An op that gives one result for all rows."""
    return node.target(x.filled(neutral), *args, **kwargs)


def _extreme(neutral: Any, node: Any, x: Rows, *args: Any, **kwargs: Any) -> Any:
    if not x.nonempty:
        raise Unmasked("the greatest or least of rows that data choose, which may be none")
    return _all_rows(neutral, node, x, *args, **kwargs)


def _each_row(neutral: Any, node: Any, x: Rows, *args: Any, **kwargs: Any) -> Any:
    """An op that gives a result for each row."""
    return Rows(node.target(x.filled(neutral), *args, **kwargs), x.mask, x.axis)


def _mean(node: Any, x: Rows, *args: Any, **kwargs: Any) -> torch.Tensor:
    axes, keep = axes_of(node, x, args, kwargs), _keeps(node, args, kwargs)
    return x.zeroed().sum(axes, keepdim=keep) / _number(x, axes)


def _var(node: Any, x: Rows, *args: Any, **kwargs: Any) -> torch.Tensor:
    axes, keep = axes_of(node, x, args, kwargs), _keeps(node, args, kwargs)
    correction = kwargs.get("correction", 1)
    number = _number(x, axes)
    mean = x.zeroed().sum(axes, keepdim=True) / number
    squares = Rows((x.tensor - mean).square(), x.mask, x.axis).zeroed()
    below = (number - (1 if correction is None else correction)).clamp(min=0)
    return squares.sum(axes, keepdim=keep) / below


def _norm(node: Any, x: Rows, order: Any = 2, *args: Any, **kwargs: Any) -> Any:
    if not order > 0:
        raise Unmasked(f"a norm of order {order} along rows that data choose")
    return node.target(x.zeroed(), order, *args, **kwargs)


def _number(x: Rows, axes: Sequence[int]) -> torch.Tensor:
    """How many elements along `axes` are in the mask."""
    number = x.mask.sum()
    for axis in axes:
        if axis != x.axis:
            number = number * x.tensor.shape[axis]
    return number


def _keeps(node: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in schema_of(node.target).arguments]
    return bool({**dict(zip(names[1:], args, strict=False)), **kwargs}.get("keepdim", False))


_RULES: dict[str, Rule] = {
    "mean": _mean,
    "var": _var,
    "linalg_vector_norm": _norm,
    "prod": partial(_all_rows, 1),
    "amax": partial(_extreme, -torch.inf),
    "amin": partial(_extreme, torch.inf),
    "any": partial(_all_rows, False),
    "all": partial(_all_rows, True),
    "cumsum": partial(_each_row, 0),
    "softmax": partial(_each_row, -torch.inf),
    "log_softmax": partial(_each_row, -torch.inf),
}
REDUCTIONS = {name: _if_along_rows(rule) for name, rule in _RULES.items()}
