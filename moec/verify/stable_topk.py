"""A program in which the first of equal values is chosen, as the kernels choose.

torch.topk and torch.sort promise no order among equal values. Scores that are exactly equal are
no rarity where a ReLU makes them: the indexers of sparse attention give 0 to every key that no
head asks for. Both choices are right, and their numbers differ.
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Graph, Op, Program, TensorType, Value

_SORTS = {
    "aten.sort.default": "aten.sort.stable",
    "aten.argsort.default": "aten.argsort.stable",
}
_TOPK = "aten.topk.default"


def first_of_equals(program: Program) -> Program | None:
    """The program with stable sorts in the place of top-k and sort; None if it has neither."""
    graph = program.graph
    if not any(op.name == _TOPK or op.name in _SORTS for op in graph.ops):
        return None
    ops = [made for op in graph.ops for made in _stable(op, graph)]
    return replace(program, graph=replace(graph, ops=tuple(ops)))


def _stable(op: Op, graph: Graph) -> list[Op]:
    if op.name in _SORTS:
        return [replace(op, name=_SORTS[op.name], attrs={**op.attrs, "stable": True})]
    if op.name != _TOPK:
        return [op]
    (x,) = op.inputs
    dim = op.attrs.get("dim", -1)
    attrs = {"stable": True, "dim": dim, "descending": op.attrs.get("largest", True)}
    whole = tuple(
        Value(f"{value.name}_sorted", TensorType(value.dtype, x.shape)) for value in op.outputs
    )
    cut = {"dim": dim, "start": 0, "end": op.attrs["k"]}
    return [
        Op("aten.sort.stable", (x,), whole, attrs, None, op.origin),
        *(
            Op("aten.slice.Tensor", (all_,), (some,), cut, None, op.origin)
            for all_, some in zip(whole, op.outputs, strict=True)
        ),
    ]
