"""moec.require_index: integers that index an axis, as eager requires where it uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.dtypes import INDEX_DTYPES
from moec.ir.graph import Op, TensorType
from moec.ir.index_uses import REQUIRE
from moec.ir.opdef import Runner, defop, require
from moec.runtime.sizes.indices import outside


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
