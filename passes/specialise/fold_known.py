"""What is known before the model runs stands in it as a constant.

    row = aten.index_select(table, task)     row: a weight
    all = aten.expand(row) <(B*S, 8)>  ->    all = aten.expand(row) <(B*S, 8)>
    y = aten.add(x, all)                     y = aten.add(x, all)

Only what somebody reads is kept: the ops before it vanish. A value that would take much more
memory than what it is made from is left to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moec.ir.dims import symbols
from moec.ir.graph import Op, Program, Value
from moec.passes.core.moe_layer import Splice
from moec.passes.core.runner import Log
from moec.passes.specialise.token_invariant import bytes_of

LIMIT = 1 << 20  # bytes that a constant may take, whatever it is made from


def fold_known(program: Program, known: Mapping[Value, torch.Tensor], log: Log) -> Program:
    """`program` with constants in the place of what is `known` (see token_invariant.py)."""
    graph = program.graph
    stays = {op for op in graph.ops if not all(value in known for value in op.outputs)}
    needed = {value for op in stays for value in op.inputs} | set(graph.results)
    splice = Splice(program)
    for op in reversed(graph.ops):
        if op in stays or not needed.intersection(op.outputs):
            continue
        left = _done(op) or (op.name != "moec.bound" and _dear(program, op, known))
        if left or not (op.name == "moec.bound" or log.spend(str(op))):
            needed.update(op.inputs)
            continue
        splice.put(
            op, [made for value in op.outputs for made in _constant(splice, op, value, known)]
        )
    return splice.done()


def _constant(
    splice: Splice, op: Op, value: Value, known: Mapping[Value, torch.Tensor]
) -> list[Op]:
    """The ops that make `value` from a constant: none, or one that repeats it."""
    tensor = known[value].contiguous()
    if not any(symbols(dim) for dim in value.shape):
        splice.weights[value] = tensor
        return []
    param = splice.weight(value.name, tensor)
    return [Op("aten.expand.default", (param,), (value,), {"size": value.shape}, None, op.origin)]


def _done(op: Op) -> bool:
    """Whether an op but repeats a constant, as `fold_known` leaves it, or is a router: those go
    with their layers."""
    return op.name in ("aten.expand.default", "moe.route")


def _dear(program: Program, op: Op, known: Mapping[Value, torch.Tensor]) -> bool:
    made = sum(bytes_of(known[value]) for value in op.outputs)
    read = [known.get(v, program.weights.get(v.name)) for v in op.inputs]
    return made > max(LIMIT, sum(bytes_of(tensor) for tensor in read if tensor is not None))
