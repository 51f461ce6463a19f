"""The table of ops with kernels of our own, and what its entries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import relax

from moec.codegen.module_builder import Lowering
from moec.ir.graph import Graph, Op

VECTOR_DTYPES = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Kernel:
    """`takes` says whether this op of this graph is one for it; `call` emits it."""

    call: Callable[[Lowering, Op], list[relax.Expr]]
    takes: Callable[[Op, Graph], bool]


KERNELS: dict[str, Kernel] = {}


def kernel(
    *names: str, takes: Callable[[Op, Graph], bool] = lambda op, graph: True
) -> Callable[[Callable[[Lowering, Op], list[relax.Expr]]], None]:
    def register(call: Callable[[Lowering, Op], list[relax.Expr]]) -> None:
        for name in names:
            KERNELS[name] = Kernel(call, takes)

    return register


def has_kernel(op: Op, graph: Graph) -> bool:
    found = KERNELS.get(op.name)
    return found is not None and found.takes(op, graph)
