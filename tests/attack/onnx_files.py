"""Damage of ONNX files. What is certainly wrong has to be refused; of other damage, a reader may
make another model, which ONNX Runtime computes alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.attack import refusal
from tests.attack.mutate import mutated_bytes

D, E = 4, 3
_HUGE = (-1, -(2**31), 2**31, 2**48, 2**60, 2**62)
_OUTSIDE = ("../weights.bin", "/etc/passwd", "folder", "none.bin", "", "link.bin")


def case(folder: Path, draw: random.Random) -> list[str]:
    """The faults as a damaged file is opened; a third of the files may be read."""
    if draw.random() < 0.67:
        return refusal.case(WRITERS, folder, draw)
    path = refusal.written(_mutated, folder, draw)
    return [f"bytes: {fault}" for fault in refusal.faults_of(path) if fault != refusal.READ]


def _model() -> ModelProto:
    """E experts, chosen by a softmax and written as a loop over MatMul, Relu, MatMul and Mul."""
    values = np.random.default_rng(0).standard_normal
    weights = {"router": values((D, E))}
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"], name="/router/MatMul"),
        helper.make_node("Softmax", ["logits"], ["shares"], axis=-1),
        helper.make_node("Split", ["shares"], [f"share{e}" for e in range(E)], axis=-1,
                         num_outputs=E),
    ]  # fmt: skip
    for e in range(E):
        weights |= {f"up{e}": values((D, 5)), f"down{e}": values((5, D))}
        nodes += [
            helper.make_node("MatMul", ["x", f"up{e}"], [f"h{e}"], name=f"/experts.{e}/MatMul"),
            helper.make_node("Relu", [f"h{e}"], [f"a{e}"]),
            helper.make_node("MatMul", [f"a{e}", f"down{e}"], [f"y{e}"]),
            helper.make_node("Mul", [f"y{e}", f"share{e}"], [f"z{e}"]),
        ]
    nodes += [helper.make_node("Sum", [f"z{e}" for e in range(E)], ["y"])]
    graph = helper.make_graph(
        nodes,
        "experts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", D])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", D])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _save(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _weight(model: ModelProto, draw: random.Random) -> TensorProto:
    weights: list[TensorProto] = [*model.graph.initializer]
    return draw.choice(weights)


def _node(model: ModelProto, draw: random.Random, *operators: str) -> NodeProto:
    nodes = [node for node in model.graph.node if not operators or node.op_type in operators]
    return draw.choice(nodes)


def _shapes(folder: Path, draw: random.Random) -> Path:
    model = _model()
    weight = _weight(model, draw)
    weight.dims[draw.randrange(2)] = draw.choice((*_HUGE, 3))
    if list(weight.dims) in ([D, 3], [3, D]):
        weight.dims[:] = [D, 3, 7]
    return _save(model, folder)


def _data(folder: Path, draw: random.Random) -> Path:
    model = _model()
    weight = _weight(model, draw)
    cut = draw.randrange(len(weight.raw_data))
    weight.raw_data = draw.choice((weight.raw_data[:cut], weight.raw_data * 2, b""))
    return _save(model, folder)


def _types(folder: Path, draw: random.Random) -> Path:
    model = _model()
    weight = _weight(model, draw)
    kinds = (0, TensorProto.STRING, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BFLOAT16)
    weight.data_type = draw.choice((*kinds, 99, 2**31 - 1))
    return _save(model, folder)


def _outside(folder: Path, draw: random.Random) -> Path:
    """A weight in another file, which is not there, has another size, or is outside."""
    model = _model()
    weight = _weight(model, draw)
    data = weight.raw_data
    beside = folder / "inside"
    beside.mkdir()
    (folder / "weights.bin").write_bytes(data)
    (beside / "link.bin").symlink_to(folder / "weights.bin")
    (beside / "folder").mkdir()
    (beside / "weights.bin").write_bytes(data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    fields = {"location": "weights.bin", "offset": "0", "length": str(len(data))}
    if draw.random() < 0.5:
        fields["location"] = draw.choice(_OUTSIDE)
    else:
        field = draw.choice(("offset", "length"))
        fields[field] = str(draw.choice((*_HUGE, len(data) + 4, "x", "1e3", "0x10", "9" * 40)))
    for key, value in fields.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return _save(model, beside)


def _edges(folder: Path, draw: random.Random) -> Path:
    """Values that nothing gives, that are given twice, or that depend on themselves."""
    model = _model()
    node = _node(model, draw)
    match draw.randrange(4):
        case 0:
            node.input[draw.randrange(len(node.input))] = "nothing"
        case 1:
            node.input[0] = node.output[0]
        case 2:
            model.graph.output[0].name = "nothing"
        case _:
            model.graph.node.add().CopyFrom(node)
    return _save(model, folder)


def _operators(folder: Path, draw: random.Random) -> Path:
    model = _model()
    node = _node(model, draw)
    field, name = draw.choice((("op_type", "Nothing"), ("op_type", ""), ("domain", "org.nobody")))
    setattr(node, field, name)
    return _save(model, folder)


def _attributes(folder: Path, draw: random.Random) -> Path:
    model = _model()
    node = _node(model, draw, "Softmax", "Split")
    attribute = draw.choice([a for a in node.attribute])
    if draw.random() < 0.7:
        attribute.i = draw.choice((*_HUGE[1:], 9, -9))
    else:
        attribute.type = onnx.AttributeProto.STRING
        attribute.s = b"\xff\xfe"
    return _save(model, folder)


def _functions(folder: Path, draw: random.Random) -> Path:
    """Functions of the file that call themselves, each other, or another number of inputs."""
    model = _model()
    names = ("First", "Second")[: draw.randint(1, 2)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    for n, name in enumerate(names):
        called = names[(n + 1) % len(names)]
        call = helper.make_node(called, ["x"], ["y"], domain="mine")
        function = helper.make_function("mine", name, ["x"], ["y"], [call], opsets)
        model.functions.append(function)
    node = _node(model, draw, "Relu")
    node.op_type, node.domain = names[0], "mine"
    model.opset_import.append(opsets[1])
    return _save(model, folder)


def _nested(folder: Path, draw: random.Random) -> Path:
    """Graphs in attributes of graphs."""
    node = helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    branch = _field(1, b"then_branch") + bytes([20 << 3 & 127 | 128, 1, onnx.AttributeProto.GRAPH])
    for _ in range(draw.choice((2, 30, 90, 400, 20_000))):
        node = _field(4, b"If") + _field(5, branch + _field(6, _field(1, node)))
    path = folder / "model.onnx"
    path.write_bytes(_model().SerializeToString() + _field(7, _field(1, node)))
    return path


def _field(number: int, content: bytes) -> bytes:
    """A field of a message of protobuf that is a string or a message."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def _ports(folder: Path, draw: random.Random) -> Path:
    model = _model()
    port = model.graph.input[0]
    match draw.randrange(4):
        case 0:
            port.type.tensor_type.elem_type = draw.choice((0, TensorProto.STRING, 77))
        case 1:
            port.type.tensor_type.shape.dim[1].dim_value = draw.choice((*_HUGE, 7))
        case 2:
            port.type.ClearField("tensor_type")
        case _:
            port.name = "other"
    return _save(model, folder)


def _names(folder: Path, draw: random.Random) -> Path:
    """A name that is no text."""
    content, broken = _model().SerializeToString(), b"\xff\xc3"
    name = draw.choice((b"/router/MatMul", b"Relu", b"logits", b"share0", b"down1", b"axis"))
    path = folder / "model.onnx"
    path.write_bytes(content.replace(name, (broken * len(name))[: len(name)]))
    return path


def _empty(folder: Path, draw: random.Random) -> Path:
    path = folder / "model.onnx"
    words = (b"", b"\0" * 64, b"\xff" * 4096, b"not a model", b"\x08\x09", draw.randbytes(512))
    path.write_bytes(draw.choice(words))
    return path


def _mutated(folder: Path, draw: random.Random) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(mutated_bytes(_model().SerializeToString(), draw))
    return path


WRITERS: Mapping[str, Callable[[Path, random.Random], Path]] = {
    "shapes": _shapes,
    "data": _data,
    "types": _types,
    "outside": _outside,
    "edges": _edges,
    "operators": _operators,
    "attributes": _attributes,
    "functions": _functions,
    "nested": _nested,
    "ports": _ports,
    "names": _names,
    "empty": _empty,
}
