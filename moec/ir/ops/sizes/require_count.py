"""moec.require_count: a mask selects as many positions as there are rows for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.errors import InputError
from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require
from moec.runtime.sizes.counts import mismatch


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
