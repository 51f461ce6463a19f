"""Values that are known before the model runs become constants.

    row = aten.index_select(table, task)     row: a weight
    all = aten.expand(row) <(B*S, 8)>  ->    all = aten.expand(row) <(B*S, 8)>
    y = aten.add(x, all)                     y = aten.add(x, all)

Only constants that other ops read are stored; the ops before them vanish. A value that would take
much more memory than its operands is still computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moec.ir.dims import symbols
from moec.ir.graph import Op, Program, Value
from moec.passes.core.moe_layer import Splice
from moec.passes.core.runner import Log
from moec.passes.specialise.token_invariant import bytes_of

LIMIT = 1 << 20  # bytes that a constant may take, however small its operands


def fold_known(program: Program, constants: Mapping[Value, torch.Tensor], log: Log) -> Program:
    """`program` with `constants` in place of the ops that compute them (token_invariant.py)."""
    graph = program.graph
    stays = {op for op in graph.ops if not all(value in constants for value in op.outputs)}
    needed = {value for op in stays for value in op.inputs} | set(graph.results)
    splice = Splice(program)
    for op in reversed(graph.ops):
        if op in stays or not needed.intersection(op.outputs):
            continue
        left = _done(op) or (op.name != "moec.bound" and _dear(program, op, constants))
        if left or not (op.name == "moec.bound" or log.spend(str(op))):
            needed.update(op.inputs)
            continue
        splice.put(
            op, [new for value in op.outputs for new in _constant(splice, op, value, constants)]
        )
    return splice.done()


def _constant(
    splice: Splice, op: Op, value: Value, constants: Mapping[Value, torch.Tensor]
) -> list[Op]:
    """The ops that compute `value` from a constant: none, or one that repeats it."""
    tensor = constants[value].contiguous()
    if not any(symbols(dim) for dim in value.shape):
        splice.weights[value] = tensor
        return []
    param = splice.weight(value.name, tensor)
    return [Op("aten.expand.default", (param,), (value,), {"size": value.shape}, None, op.origin)]


def _done(op: Op) -> bool:
    """Whether an op only repeats a constant, as `fold_known` leaves it, or is a router, which goes
    with its layer."""
    return op.name in ("aten.expand.default", "moe.route")


def _dear(program: Program, op: Op, constants: Mapping[Value, torch.Tensor]) -> bool:
    size = sum(bytes_of(constants[value]) for value in op.outputs)
    read = [constants.get(v, program.weights.get(v.name)) for v in op.inputs]
    return size > max(LIMIT, sum(bytes_of(tensor) for tensor in read if tensor is not None))
