"""Common subexpression elimination: ops of the same name, inputs, attributes and body become one.

Banks of experts that share their routing then share its sort, as moe.dispatch and moe.sort are
treated like any other op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.text import print_graph, show_attr
from moec.ir.traits import is_reproducible
from moec.passes.core.rewrite import rebuild
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class ShareCommon(Pass):
    """Compute equal values once, including the dispatch that several banks of experts share."""

    name: ClassVar[str] = "share-common"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        new: dict[Value, Value] = {}
        first_ops: dict[tuple[object, ...], Op] = {}
        ops: list[Op] = []
        for old in graph.ops:
            op = replace(old, inputs=tuple(new.get(v, v) for v in old.inputs))
            key = _key(op)
            first = first_ops.get(key)
            if first is not None and _shareable(op) and log.spend(f"{op} = {first}"):
                new |= dict(zip(old.outputs, first.outputs, strict=True))
                continue
            first_ops.setdefault(key, op)
            ops.append(op)
        return Program(rebuild(graph, ops, new), program.weights)


def _key(op: Op) -> tuple[object, ...]:
    attrs = tuple((name, show_attr(value)) for name, value in sorted(op.attrs.items()))
    body = print_graph(op.body) if op.body is not None else ""
    types = tuple(str(value.type) for value in op.outputs)
    return (op.name, op.inputs, attrs, body, types)


def _shareable(op: Op) -> bool:
    return op.name not in ("aten.alias.default", "moec.size") and is_reproducible(op.name)
