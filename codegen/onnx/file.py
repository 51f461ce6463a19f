"""Writes an ONNX model, with its weights in one data file beside it.

Every weight is written as soon as it is computed, so memory never holds a second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from moec.codegen.onnx.lower import OnnxGraph
from moec.codegen.onnx.profiles import MICROSOFT
from moec.codegen.onnx.writer import Node, Weight, onnx_type
from moec.ir.graph import TensorType
from moec.ir.sizes.dims import show_dim

if TYPE_CHECKING:
    from onnx import ModelProto

ALIGNMENT = 4096  # lets a runtime map each weight
INLINE = 1024  # bytes; smaller weights are stored in the model itself
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11, 25: 12}


@dataclass(frozen=True)
class OnnxFile:
    """The number of all nodes, and of those for MoE blocks; `bytes` is the size of model and
    data."""

    nodes: int
    moe_nodes: int
    bytes: int


def write(
    lowered: OnnxGraph, weights: Mapping[str, torch.Tensor], path: Path, about: Mapping[str, Any]
) -> OnnxFile:
    """Writes `path`, and `path` + ".data" if there are weights of more than INLINE bytes."""
    data = path.with_name(f"{path.name}.data")
    nodes = lowered.nodes()
    read = {name for node in nodes for name in node.inputs}
    with data.open("wb") as file:
        stored = [
            _stored(name, weight, weights, file, data.name)
            for name, weight in lowered.writer.weights.items()
            if name in read
        ]
    size = data.stat().st_size
    if not size:
        data.unlink()
    proto = model(lowered, nodes, stored, about)
    onnx.save_model(proto, path)
    moe = sum(node.by.startswith(("moe.", "grouped.")) for node in nodes)
    return OnnxFile(len(nodes), moe, size + path.stat().st_size)


def debug(lowered: OnnxGraph, path: Path, about: Mapping[str, Any]) -> ModelProto:
    """The model at `path` with the expert ids as additional outputs, one per block."""
    names = tuple(dict.fromkeys(name for _, name in lowered.choices))
    nodes = lowered.nodes(names)
    stored = onnx.load_model(path, load_external_data=False).graph.initializer
    proto = model(lowered, nodes, stored, about)
    output_names = {output.name for output in proto.graph.output}
    types = {name: value for value, name in lowered.choices}
    proto.graph.output.extend(
        _info(name, types[name].type) for name in names if name not in output_names
    )
    return proto


def model(
    lowered: OnnxGraph,
    nodes: Sequence[Node],
    stored: Sequence[Any],
    about: Mapping[str, Any],
) -> ModelProto:
    w, graph = lowered.writer, lowered.graph
    read = {name for node in nodes for name in node.inputs}
    computed = {name for node in nodes for name in node.outputs}
    constants = [
        numpy_helper.from_array(array, name) for name, array in w.constants.items() if name in read
    ]
    top = frozenset(graph.values())
    edges = {*(value.name for value in graph.inputs), *lowered.outputs}
    infos = {
        name: _info(name, value.type)
        for value, name in w.names.items()
        if name in computed and name not in edges and value in top
    }
    body = helper.make_graph(
        [_node(node) for node in nodes],
        graph.name,
        [_info(value.name, value.type) for value in graph.inputs],
        [_info(n, v.type) for n, v in zip(lowered.outputs, graph.outputs, strict=True)],
        [*stored, *constants],
        value_info=list(infos.values()),
    )
    opsets = [helper.make_opsetid("", w.opset)]
    if any(node.domain == MICROSOFT for node in nodes):
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    proto = helper.make_model(
        body,
        opset_imports=opsets,
        ir_version=IR_VERSIONS[w.opset],
        producer_name="moec",
        producer_version=version("moec"),
    )
    helper.set_model_props(proto, {f"moec.{k}": _text(v) for k, v in about.items()})
    return proto


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _info(name: str, type: TensorType) -> Any:
    dims = [d if isinstance(d, int) else show_dim(d) for d in type.shape]
    return helper.make_tensor_value_info(name, onnx_type(type.dtype), dims)


def _node(node: Node) -> Any:
    attrs = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in node.attrs.items()
    }
    return helper.make_node(
        node.kind, node.inputs, node.outputs, name=node.name, domain=node.domain, **attrs
    )


def _stored(
    name: str, weight: Weight, weights: Mapping[str, torch.Tensor], file: Any, location: str
) -> Any:
    tensors = [weights[param].detach() for param in weight.params]
    tensor = weight.make(*tensors).contiguous()
    # a copy, because the weights of a large checkpoint have values for operators of torch only
    flat = tensor.reshape(-1).clone().view(torch.uint8)
    raw: Any = flat.numpy() if tensor.numel() else b""
    proto = TensorProto(name=name, data_type=onnx_type(weight.dtype), dims=weight.shape)
    if len(raw) < INLINE:
        proto.raw_data = bytes(raw)
        return proto
    start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.write(b"\0" * (start - file.tell()))
    file.write(raw)
    proto.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", start), ("length", len(raw))):
        proto.external_data.add(key=key, value=str(value))
    return proto
