"""Values that a program computes from constants alone become constants themselves.

    row = aten.index_select(table, task)     row: a weight
    all = aten.expand(row) <(B*S, 8)>  ->    all = aten.expand(row) <(B*S, 8)>
    y = aten.add(x, all)                     y = aten.add(x, all)

Only constants that remaining ops read are stored; the ops that computed them are removed. A value
that would take much more memory than its operands is still computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moec.ir.graph import Op, Program, Value
from moec.ir.sizes.dims import symbols
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
        left = _is_folded(op) or (op.name != "moec.bound" and _is_costly(program, op, constants))
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
    """The ops that compute `value` from its stored constant: none, or one expand."""
    tensor = constants[value].contiguous()
    if not any(symbols(dim) for dim in value.shape):
        splice.weights[value] = tensor
        return []
    param = splice.weight(value.name, tensor)
    return [Op("aten.expand.default", (param,), (value,), {"size": value.shape}, None, op.origin)]


def _is_folded(op: Op) -> bool:
    """Whether `fold_known` leaves the op: an expand of a constant, or a router, which is removed
    together with its layer."""
    return op.name in ("aten.expand.default", "moe.route")


def _is_costly(program: Program, op: Op, constants: Mapping[Value, torch.Tensor]) -> bool:
    size = sum(bytes_of(constants[value]) for value in op.outputs)
    read = [constants.get(v, program.weights.get(v.name)) for v in op.inputs]
    return size > max(LIMIT, sum(bytes_of(tensor) for tensor in read if tensor is not None))
