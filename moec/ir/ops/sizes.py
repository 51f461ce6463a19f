"""Ops of sizes: read from data, bound by a pass, required to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.dtypes import INDEX_DTYPES
from moec.errors import InputError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import DType, Op, TensorType
from moec.ir.index_uses import REQUIRE
from moec.ir.opdef import Runner, defop, require
from moec.ir.sizes.dims import Dim, product, symbols
from moec.runtime.sizes.counts import mismatch
from moec.runtime.sizes.indices import outside


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


def _infer_require_count(op: Op) -> tuple[TensorType, ...]:
    order, count = op.inputs
    require(op, count.type == TensorType("i64", ()), f"{count} is not one number of dtype i64")
    return (order.type,)


@defop("moec.require_count", _infer_require_count, "order, count")
def require_count(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """order, count i64[] -> order, if count is `rows`; at most `rows`, if not `exact`.

    Attributes: `mask` and `source` name the inputs of the model that decide the count and the rows.
    Raises InputError otherwise, as eager does.
    """
    order, count = tensors
    sentence = mismatch(int(count), attrs["rows"], attrs["exact"], attrs["mask"], attrs["source"])
    if sentence is not None:
        raise InputError(sentence)
    return order


def _infer_require_index(op: Op) -> tuple[TensorType, ...]:
    (ids,) = op.inputs
    require(op, ids.dtype in INDEX_DTYPES, f"{ids} holds no indices")
    return (ids.type,)


@defop(REQUIRE, _infer_require_index, "ids")
def require_index(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """ids -> ids, if all are from 0 to `rows` - 1; from -`rows`, if `negative`.

    `what` says in messages what they index. Raises IndexError otherwise, as eager does.
    """
    (ids,) = tensors
    if ids.numel():
        low, high = map(int, ids.aminmax())
        sentence = outside(low, high, attrs["rows"], attrs["negative"], attrs["what"])
        if sentence is not None:
            raise IndexError(sentence)
    return ids


def _infer_size(op: Op) -> tuple[TensorType, ...]:
    require(op, op.inputs[0].shape in ((), (1,)), f"{op.inputs[0]} is not one number")
    return (op.inputs[0].type,)


@defop("moec.size", _infer_size, "size")
def size(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """One integer -> itself; from here on the size `name` has that value."""
    return tensors[0]
