"""Which operators of torch are composed of others, and which of them are not decomposed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import fx

from moec.capture.decomposition.kernels import LEFT_OUT, WRITTEN_OUT
from moec.torch_private import OpOverload, get_decompositions, has_kernel_for, registrations_of

WHOLE = frozenset(
    {
        "aten.linear.default",
        "aten.scaled_dot_product_attention.default",
        "aten.silu.default",
        "aten.gelu.default",
        "aten.layer_norm.default",
        "aten.softmax.int",
        "aten.log_softmax.int",
        "aten.matmul.default",
        "aten.linalg_vector_norm.default",  # decomposed since torch 2.14
    }
)
"""Operators that are kept, because moec has kernels for them."""


@cache
def _decompositions(composite: int) -> Mapping[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    table = {op: table[op] for op in list(table) if str(op) not in WHOLE}
    return {**table, **get_decompositions(LEFT_OUT), **WRITTEN_OUT}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions to core ATen, without those of the operators in `WHOLE`.

    torch's table is slow to build, and grows where more composite operators are registered.
    """
    return dict(_decompositions(composite_count()))


def composite_count() -> int:
    """The number of registered composite operators, torch's and others."""
    return len(registrations_of("CompositeImplicitAutograd"))


def is_composite(node: fx.Node, table: Collection[Any]) -> bool:
    """Whether `node` calls an operator that is decomposed, by `table` or by torch itself."""
    if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
        return False  # a size
    return str(node.target) not in WHOLE and (is_implicit(node.target) or node.target in table)


def is_implicit(target: Any) -> bool:
    """Whether an operator is composed of others on every device. Its result may be a view of an
    operand, or the operand itself (dropout in eval), even if its schema does not say so."""
    if not isinstance(target, OpOverload):
        return False
    name = cast(Any, target).name()
    return bool(has_kernel_for(name, "CompositeImplicitAutograd"))
