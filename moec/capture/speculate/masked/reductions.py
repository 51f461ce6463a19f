"""The axes of reductions, and the mean along the axis of masked rows.

A mean divides by the number of rows in the mask; the rows outside of it are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moec.capture.speculate.masked.values import Rows
from moec.torch_private import schema_of


def axes_of(node: Any, x: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The axes along which an op of `x` works."""
    dim = _arguments(node, args, kwargs).get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.tensor.ndim))
    return [axis % x.tensor.ndim for axis in dims]


def mean(node: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Rows) or x.axis not in axes_of(node, x, args, kwargs):
        return NotImplemented
    axes = axes_of(node, x, args, kwargs)
    keepdim = bool(_arguments(node, args, kwargs).get("keepdim", False))
    number = x.mask.sum()
    for axis in axes:
        if axis != x.axis:
            number = number * x.tensor.shape[axis]
    return x.zeroed().sum(axes, keepdim=keepdim) / number


def _arguments(node: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in schema_of(node.target).arguments]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}
