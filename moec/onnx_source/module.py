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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from moec.errors import CaptureError
from moec.onnx_source.exported import INDEXING, read_indexing
from moec.onnx_source.layout import LAYOUT, OUTPUTS, VALUE
from moec.onnx_source.operators import OPERATORS, Operator, dtype_of
from moec.onnx_source.sizes import Value, tensor

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
