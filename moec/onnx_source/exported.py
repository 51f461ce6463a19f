"""Indexing that torch's exporters write out, as one node of the domain `moec` each.

    Gather(Flatten(w, n), Add(j, Mul(i, size)))             w[i, j]                  IndexPairs
    ScatterElements(x, Expand(Unsqueeze(rows)), v)          x[rows] = v              PutRows
    Add(y, PutRows(zeros, rows, v))                         y[rows] = y[rows] + v    AddRows

Each computes what the nodes in its stead do, for all ids that are valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx
import torch
from torch import Tensor

from moec.onnx_source.operators import Attributes, Operator
from moec.onnx_source.sizes import Value, tensor

DOMAIN = "moec"
_Producers = Mapping[str, onnx.NodeProto]


def read_indexing(nodes: Iterable[onnx.NodeProto], results: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes with those of the domain `moec`, without nodes that no result depends on."""
    rewritten = list(nodes)
    for rule in (_index_pairs, _put_rows, _add_rows):
        producers = {name: node for node in rewritten for name in node.output}
        reads = Counter(name for node in rewritten for name in node.input)
        rewritten = [rule(node, producers, reads) or node for node in rewritten]
    needed, live = set(results), []
    for node in reversed(rewritten):
        if needed.intersection(node.output):
            needed.update(node.input)
            live.append(node)
    return live[::-1]


def _index_pairs(
    node: onnx.NodeProto, producers: _Producers, reads: Mapping[str, int]
) -> onnx.NodeProto | None:
    if node.op_type != "Gather" or _number(node, "axis", 0) != 0:
        return None
    flat, ids = (_producer(producers, name) for name in node.input)
    if flat.op_type != "Flatten" or _number(flat, "axis", 1) != 2 or ids.op_type != "Add":
        return None
    for last, scaled in (ids.input, ids.input[::-1]):
        product = _producer(producers, scaled)
        factors = (product.input, product.input[::-1]) if product.op_type == "Mul" else ()
        for first, length in factors:
            of_axis = _producer(producers, length)
            if of_axis.op_type != "Gather":
                continue
            shape, axis = (_producer(producers, name) for name in of_axis.input)
            if shape.op_type == "Shape" and shape.input[0] == flat.input[0] and _is(axis, 1):
                return _node("IndexPairs", node, [flat.input[0], first, last])
    return None


def _put_rows(
    node: onnx.NodeProto, producers: _Producers, reads: Mapping[str, int]
) -> onnx.NodeProto | None:
    if node.op_type != "ScatterElements" or _number(node, "axis", 0) or len(node.attribute) > 1:
        return None
    data, ids, values = node.input
    expand = _producer(producers, ids)
    column = _producer(producers, expand.input[0]) if expand.op_type == "Expand" else _NONE
    if column.op_type != "Unsqueeze" or len(column.input) < 2:
        return None
    if not _is(_producer(producers, column.input[1]), 1):
        return None
    return _node("PutRows", node, [data, column.input[0], values])


def _add_rows(
    node: onnx.NodeProto, producers: _Producers, reads: Mapping[str, int]
) -> onnx.NodeProto | None:
    if node.op_type != "Add":
        return None
    for y, part in (node.input, node.input[::-1]):
        put = _producer(producers, part)
        if put.op_type == "PutRows" and reads[part] == 1:
            zeros = _producer(producers, put.input[0])
            if zeros.op_type == "ConstantOfShape" and not _filled(zeros):
                return _node("AddRows", node, [y, *put.input[1:]])
    return None


_NONE = onnx.NodeProto()


def _producer(producers: _Producers, name: str) -> onnx.NodeProto:
    return producers.get(name, _NONE)


def _number(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _is(node: onnx.NodeProto, number: int) -> bool:
    """Whether a node is the constant of this one number."""
    if node.op_type != "Constant" or node.attribute[0].name != "value":
        return False
    array = onnx.numpy_helper.to_array(node.attribute[0].t)
    return array.size == 1 and bool(array.item() == number)


def _filled(node: onnx.NodeProto) -> bool:
    """Whether a ConstantOfShape has a number other than 0."""
    return any(onnx.numpy_helper.to_array(a.t).item() != 0 for a in node.attribute)


def _node(name: str, like: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
    return onnx.helper.make_node(name, inputs, like.output, name=like.name, domain=DOMAIN)


def index_pairs(attributes: Attributes, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[rows, columns], with all other axes as one."""
    return x[tensor(rows), tensor(columns)].flatten(1)


def put_rows(attributes: Attributes, x: Value, rows: Value, values: Tensor) -> Tensor:
    """x with `values` at the first columns of these rows, which are all in most models."""
    into, ids = tensor(x), tensor(rows)
    if into.ndim == 2 and into.shape[1] == values.shape[1]:
        return into.index_put((ids,), values)
    return into.scatter(0, ids.unsqueeze(1).expand_as(values), values)


def add_rows(attributes: Attributes, y: Value, rows: Value, values: Tensor) -> Tensor:
    total, ids = tensor(y), tensor(rows)
    if total.ndim == 2 and total.shape[1] == values.shape[1]:
        return total.index_put((ids,), total[ids] + values)
    zeros = torch.zeros_like(total)
    return total + zeros.scatter(0, ids.unsqueeze(1).expand_as(values), values)


INDEXING: dict[str, Operator] = {
    f"{DOMAIN}.IndexPairs": index_pairs,
    f"{DOMAIN}.PutRows": put_rows,
    f"{DOMAIN}.AddRows": add_rows,
}
