"""moe.hierarchy: experts weighted by gates at two levels, with a softmax within each group.

Hierarchical mixtures of experts: Jordan and Jacobs, Neural Computation 6 (1994).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require


def groups_of(op: Op) -> tuple[int, ...]:
    """The number of experts of each group."""
    return cast("tuple[int, ...]", op.attrs["groups"])


def _infer_hierarchy(op: Op) -> tuple[TensorType, ...]:
    values, logits, weights = op.inputs
    groups = groups_of(op)
    require(op, values.shape == logits.shape, f"{logits.type} weighs {values.type}")
    require(op, sum(groups) == values.shape[-1], f"groups {groups} of {values.shape[-1]} experts")
    expected = (*values.shape[:-1], len(groups))
    require(op, weights.shape == expected, f"{weights} does not weigh {len(groups)} groups")
    return (TensorType(values.dtype, values.shape[:-1]),)


@defop("moe.hierarchy", _infer_hierarchy, "values, logits, weights")
def hierarchy(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """values[.., E], logits[.., E], weights[.., G] -> the sum over groups g of
    weights[.., g] * sum over the experts e of g of softmax(logits of g)[.., e] * values[.., e].

    `groups` has the number of experts of each group; the experts of a group are consecutive.
    """
    values, logits, weights = tensors
    groups = list(groups_of(op))
    shares = torch.cat([part.softmax(-1) for part in torch.split(logits, groups, -1)], -1)
    parts = [part.sum(-1) for part in torch.split(shares * values, groups, -1)]
    return (torch.stack(parts, -1) * weights).sum(-1)
