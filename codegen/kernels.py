"""Ops with kernels of our own, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import relax

from moec.codegen.lower import Lowering
from moec.ir import Graph, Op
from moec.target import Target


@dataclass(frozen=True)
class Kernel:
    """`takes` says whether this op of this graph is one for it; `call` emits it."""

    call: Callable[[Lowering, Op], list[relax.Expr]]
    takes: Callable[[Op, Graph, Target], bool]


KERNELS: dict[str, Kernel] = {}


def has_kernel(op: Op, graph: Graph, target: Target) -> bool:
    kernel = KERNELS.get(op.name)
    return kernel is not None and kernel.takes(op, graph, target)
