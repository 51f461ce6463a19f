"""moec.bound: an input that a pass has bound to a constant, until it is folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import DType, Op, TensorType
from moec.ir.opdef import Runner, defop, require
from moec.ir.sizes.dims import Dim, product, symbols


def periodic_constant(op: Op) -> torch.Tensor:
    """The constant with size 1 for each axis of a named size, along which it repeats."""
    shape = [1 if symbols(dim) else int(dim) for dim in op.outputs[0].shape]
    dtype = TORCH_DTYPES[op.outputs[0].dtype]
    return torch.tensor(op.attrs["value"], dtype=dtype).reshape(shape)


def _infer_bound(op: Op) -> tuple[TensorType, ...]:
    shape, value = cast("tuple[Dim, ...]", op.attrs["shape"]), op.attrs["value"]
    elements = product(tuple(1 if symbols(dim) else dim for dim in shape))
    require(
        op, isinstance(value, tuple) and len(value) == elements, f"{value} does not fill {shape}"
    )
    return (TensorType(cast(DType, op.attrs["dtype"]).name, shape),)


@defop("moec.bound", _infer_bound, "")
def bound(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """-> `value`, numbers in order, repeated along the axes of `shape` whose sizes are named."""
    return periodic_constant(op).expand(attrs["shape"])
