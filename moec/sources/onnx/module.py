"""The graph of an ONNX file as a torch module, a submodule for each node.

Submodules have the paths that the exporter's names give them: the node
`/layers.0/moe/experts.1/MatMul` is the submodule `layers.0.moe.experts.1.MatMul`, so that reports
name the blocks as the model's author did.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from moec.errors import CaptureError
from moec.sources.onnx.layout import LAYOUT, OUTPUTS, VALUE
from moec.sources.onnx.operators import OPERATORS, Attributes, Operator, dtype_of
from moec.sources.onnx.sizes import Value, tensor

# Indexing that torch's exporters write out, as one node of the domain `moec` each.
#
#     Gather(Flatten(w, n), Add(j, Mul(i, size)))             w[i, j]                  IndexPairs
#     ScatterElements(x, Expand(Unsqueeze(rows)), v)          x[rows] = v              PutRows
#     Add(y, PutRows(zeros, rows, v))                         y[rows] = y[rows] + v    AddRows
#
# Each computes what the nodes in its stead do, for all ids that are valid.

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


FEW = 16
"""The most elements of an integer constant that may be a shape, axes or a size."""
_OWN = ("", "ai.onnx")


class OnnxNode(nn.Module):
    """A node: its outputs from its inputs."""

    def __init__(self, node: onnx.NodeProto, operator: Operator) -> None:
        super().__init__()
        self.inputs, self.outputs = tuple(node.input), tuple(node.output)
        self.operator = operator
        # a parameter that is annotated as a tensor takes no sizes
        parameters = list(inspect.signature(operator).parameters.values())[1:]
        self.tensors = [str(p.annotation).startswith("Tensor") for p in parameters]
        self.attributes = {a.name: _attribute(a) for a in node.attribute}
        self.attributes[OUTPUTS] = len(node.output)
        if isinstance(filled := self.attributes.get(VALUE), Tensor):
            self.attributes[VALUE] = filled.item(), filled.dtype
        self.described = f"{node.op_type} {node.name}".strip()

    def forward(self, *values: Value) -> Any:
        try:
            pairs = itertools.zip_longest(values, self.tensors[: len(values)], fillvalue=False)
            inputs = (tensor(v) if is_tensor and v is not None else v for v, is_tensor in pairs)
            return self.operator(self.attributes, *inputs)
        except (NotImplementedError, ValueError) as error:
            raise CaptureError(f"the node {self.described}: {error}") from error


class OnnxModule(nn.Module):
    """The graph of a model, called with its inputs by name; its outputs are a dict by name.

    Raises CaptureError for operators that moec cannot read, all of them listed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph, names = model.graph, _Names()
        self.constants: dict[str, Value] = {"": None}
        self.weights: dict[str, tuple[nn.Module, str]] = {}
        _check(node for node in graph.node if node.op_type != "Constant")
        live = read_indexing(graph.node, (output.name for output in graph.output))
        nodes = [node for node in live if node.op_type != "Constant"]
        for node in live:
            if node.op_type == "Constant":
                self._constant(node)
        for initializer in graph.initializer:
            self._hold(initializer.name, tensor_of(initializer), names)
        self.nodes: list[OnnxNode] = []
        for node in nodes:
            module = OnnxNode(node, TABLE[_name(node)])
            names.attach(self, node.name or node.op_type, module)
            self.nodes.append(module)
        self.results = tuple(output.name for output in graph.output)
        last = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        self.freed: list[list[str]] = [[] for _ in self.nodes]
        for name, position in last.items():
            if name not in self.results:
                self.freed[position].append(name)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        held = {name: getattr(module, leaf) for name, (module, leaf) in self.weights.items()}
        values: dict[str, Value] = {**self.constants, **held, **inputs}
        for node, freed in zip(self.nodes, self.freed, strict=True):
            result = node(*(values[name] for name in node.inputs))
            several = isinstance(result, tuple) or (len(node.outputs) > 1)
            for name, value in zip(node.outputs, result if several else (result,), strict=False):
                values[name] = value
            for name in freed:
                values.pop(name, None)
        return {name: tensor(values[name]) for name in self.results}

    def _constant(self, node: onnx.NodeProto) -> None:
        (attribute,) = node.attribute
        value = _attribute(attribute)
        if not isinstance(value, Tensor):
            value = torch.tensor(value)
        self.constants[node.output[0]] = _as_sizes(value)

    def _hold(self, name: str, value: Tensor, names: _Names) -> None:
        few = _as_sizes(value)
        if not isinstance(few, Tensor):
            self.constants[name] = few
            return
        held = nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
        self.weights[name] = names.attach(self, name, held)


class _Names:
    """Paths of submodules and weights that no other has."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()

    def attach(self, root: nn.Module, name: str, part: nn.Module | Tensor) -> tuple[nn.Module, str]:
        """Puts a node or weight where its name says; returns the module that has it, and its name
        there."""
        path = [re.sub(r"\W", "_", word) or "_" for word in re.split(r"[/.]+", name.strip("/."))]
        module = root
        for word in path[:-1]:
            child = getattr(module, word, None)
            if not isinstance(child, nn.Module) or isinstance(child, OnnxNode):
                word = self._unused(module, word)
                module.add_module(word, nn.Module())
            module = module.get_submodule(word)
        last = self._unused(module, path[-1])
        if isinstance(part, nn.Module):
            module.add_module(last, part)
        elif isinstance(part, nn.Parameter):
            module.register_parameter(last, part)
        else:
            module.register_buffer(last, part)
        return module, last

    def _unused(self, module: nn.Module, word: str) -> str:
        while hasattr(module, word):
            self.used[word] += 1
            word = f"{word}_{self.used[word]}"
        return word


TABLE: Mapping[str, Operator] = {**OPERATORS, **LAYOUT, **INDEXING}


def _check(nodes: Iterable[onnx.NodeProto]) -> None:
    missing = Counter(name for name in map(_name, nodes) if name not in TABLE)
    if missing:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(missing.items()))
        raise CaptureError(
            f"operators of ONNX that moec does not read: {listed}; export the model again without "
            "them (no optimisation of the exporter or of ONNX Runtime), or give moec the PyTorch "
            "model"
        )


def _name(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in _OWN else f"{node.domain}.{node.op_type}"


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return tensor_of(value)
    return list(value) if attribute.type in _LISTS else value


_LISTS = (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS, onnx.AttributeProto.STRINGS)


def _as_sizes(value: Tensor) -> Value:
    """A constant as sizes, if it may be one of a shape."""
    if value.dtype == torch.int64 and value.ndim <= 1 and value.numel() <= FEW:
        sizes: Value = value.tolist()
        return sizes
    return value


# ---- tensors of ONNX as those of torch -----------------------------------------------


def tensor_of(proto: onnx.TensorProto) -> torch.Tensor:
    """The tensor. Raises CaptureError where its elements are of no supported type or too few."""
    try:
        dtype = dtype_of(proto.data_type)
        array = np.array(onnx.numpy_helper.to_array(proto))
    except (NotImplementedError, ValueError, TypeError) as error:
        raise CaptureError(f"the tensor {proto.name!r} cannot be read: {error}") from error
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
