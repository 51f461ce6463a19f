"""moec.size: a size that is read from data (`.item()`, `.tolist()`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require


def _infer_size(op: Op) -> tuple[TensorType, ...]:
    require(op, op.inputs[0].shape in ((), (1,)), f"{op.inputs[0]} is not one number")
    return (op.inputs[0].type,)


@defop("moec.size", _infer_size, "size")
def size(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """One integer -> itself; from here on the size `name` has that value."""
    return tensors[0]
