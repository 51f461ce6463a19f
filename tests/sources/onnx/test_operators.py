"""Each operator of ONNX that moec reads, beside ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from moec.errors import CaptureError
from moec.sources.onnx.module import TABLE, OnnxModule

F32, I64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
NAMES = {np.dtype("float32"): F32, np.dtype("int64"): I64, np.dtype("bool"): BOOL}


@dataclass(frozen=True)
class Case:
    """A node of one operator: arrays that are inputs of the graph, constants after them, and
    attributes."""

    name: str
    inputs: tuple[np.ndarray, ...]
    constants: tuple[np.ndarray | None, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    domain: str = ""

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.attributes.items()]
        return " ".join([self.name, *map(str, (a.shape for a in self.inputs)), *words])


def model(case: Case) -> onnx.ModelProto:
    inputs = [f"x{i}" for i in range(len(case.inputs))]
    constants = {f"c{i}": c for i, c in enumerate(case.constants) if c is not None}
    names = [f"c{i}" if c is not None else "" for i, c in enumerate(case.constants)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(
        case.name, inputs + names, outputs, domain=case.domain, **case.attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(n, NAMES[a.dtype], a.shape)
            for n, a in zip(inputs, case.inputs, strict=True)
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(c, n) for n, c in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


X, Y = floats(2, 3, 4), floats(2, 3, 4, seed=1)
WHOLE = np.arange(-6, 6).reshape(3, 4)
POSITIVE = np.abs(X) + 0.5
CASES = [
    *(Case(n, (X, Y)) for n in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Less")),
    *(Case(n, (X, Y)) for n in ("Greater", "LessOrEqual", "GreaterOrEqual", "Sum")),
    *(Case(n, (X,)) for n in ("Abs", "Neg", "Exp", "Erf", "Sin", "Cos", "Tanh", "Sigmoid")),
    *(Case(n, (X,)) for n in ("Relu", "Softplus", "HardSwish", "Mish", "Floor", "Ceil", "Round")),
    *(Case(n, (X,)) for n in ("Sign", "Identity", "Elu", "LeakyRelu", "HardSigmoid", "IsNaN")),
    *(Case(n, (POSITIVE,)) for n in ("Sqrt", "Reciprocal", "Log")),
    *(Case(n, (X > 0, Y > 0)) for n in ("And", "Or", "Xor")),
    Case("Not", (X > 0,)),
    *(Case(n, (WHOLE,), (ids(4),)) for n in ("Add", "Sub", "Mul", "Div", "Mod", "Equal")),
    Case("Div", (WHOLE,), (ids(-4),)),
    Case("Mod", (X, POSITIVE), attributes={"fmod": 1}),
    Case("Pow", (POSITIVE, Y)),
    Case("PRelu", (X, floats(4))),
    Case("Gelu", (X,), domain="com.microsoft"),
    Case("FastGelu", (X, floats(4)), domain="com.microsoft"),
    Case("QuickGelu", (X,), domain="com.microsoft"),
    Case("Where", (X > 0, X, Y)),
    Case("Clip", (X,), (np.float32(-0.5), np.float32(0.5))),
    Case("Clip", (X,), (None, np.float32(0.5))),
    Case("Cast", (X * 3,), attributes={"to": I64}),
    Case("Cast", (X,), attributes={"to": BOOL}),
    Case("CastLike", (WHOLE, X)),
    *(Case(n, (X,), attributes={"axis": a}) for n in ("Softmax", "LogSoftmax") for a in (-1, 1)),
    Case("MatMul", (X, floats(4, 5))),
    Case("MatMul", (floats(3), floats(3, 2))),
    Case("FusedMatMul", (X, Y), attributes={"transB": 1, "alpha": 0.5}, domain="com.microsoft"),
    Case("Gemm", (floats(3, 4), floats(5, 4), floats(5)), attributes={"transB": 1}),
    Case("Gemm", (floats(4, 3), floats(4, 5)), attributes={"transA": 1, "alpha": 0.5}),
    Case("Gemm", (floats(3, 4), floats(4, 5), floats(3, 1)), attributes={"beta": 2.0}),
    Case("Einsum", (X, Y), attributes={"equation": "bsd,btd->bst"}),
    *(
        Case(f"Reduce{n}", (X,), (ids(1),), {"keepdims": k})
        for n in ("Sum", "Mean", "Max", "Min", "L2", "SumSquare", "LogSumExp", "Prod")
        for k in (0, 1)
    ),
    Case("ReduceSum", (X,)),
    Case("ReduceMean", (X,), attributes={"noop_with_empty_axes": 1}),
    Case("ArgMax", (X,), attributes={"axis": 2, "keepdims": 0}),
    Case("TopK", (X,), (ids(2),), {"axis": 1}, outputs=2),
    Case("TopK", (X,), (ids(1),), {"largest": 0}, outputs=2),
    Case("CumSum", (X,), (np.int64(1),)),
    Case("LayerNormalization", (X, floats(4), floats(4)), attributes={"epsilon": 1e-3}),
    Case("SimplifiedLayerNormalization", (X, floats(4))),
    Case("BatchNormalization", (X, *(np.abs(floats(3, seed=i)) + 0.1 for i in range(4)))),
    Case("Conv", (floats(2, 4, 6, 5), floats(6, 2, 3, 3), floats(6)), attributes={"group": 2}),
    Case(
        "Conv", (floats(1, 2, 9), floats(3, 2, 3)),
        attributes={"pads": [2, 1], "strides": [2], "dilations": [2]},
    ),
    Case("Shape", (X,)),
    Case("Shape", (X,), attributes={"start": 1, "end": -1}),
    Case("Size", (X,)),
    Case("Reshape", (X,), (ids(0, -1),)),
    Case("Reshape", (floats(2, 0, 4),), (ids(0, 4),), {"allowzero": 1}),
    *(Case("Flatten", (X,), attributes={"axis": a}) for a in (0, 1, 2, -1)),
    Case("Transpose", (X,)),
    Case("Transpose", (X,), attributes={"perm": [1, 0, 2]}),
    Case("Unsqueeze", (X,), (ids(0, -1),)),
    Case("Squeeze", (floats(1, 3, 1),), (ids(2),)),
    Case("Squeeze", (floats(1, 3, 1),)),
    Case("Concat", (X, Y), attributes={"axis": 1}),
    Case("Split", (X,), (ids(1, 3),), {"axis": 2}, outputs=2),
    Case("Split", (X,), (), {"axis": 1, "num_outputs": 2}, outputs=2),
    Case("Slice", (X,), (ids(1, -3), ids(2**63 - 1, -1), ids(1, 2))),
    Case("Slice", (X,), (ids(0), ids(4), ids(2), ids(2))),
    Case("Gather", (X, ids(1, 0, 1)), attributes={"axis": 1}),
    Case("Gather", (X,), (np.int64(1),), {"axis": 2}),
    Case("Gather", (X, WHOLE % 2)),
    Case("GatherElements", (X, np.abs(WHOLE).reshape(1, 3, 4) % 2)),
    Case("GatherND", (X, np.array([[0, 1], [1, 2]]))),
    Case("ScatterElements", (floats(3, 4), np.array([[0, 2], [1, 0]]), floats(2, 2))),
    Case(
        "ScatterElements", (floats(3, 4), np.array([[0], [0]]), floats(2, 1)),
        attributes={"reduction": "add", "axis": 1},
    ),
    Case("ScatterND", (X, np.array([[1, 2], [0, 0]]), floats(2, 4))),
    Case("ScatterND", (X, np.array([[1], [1]]), floats(2, 3, 4)), attributes={"reduction": "add"}),
    Case("Expand", (floats(3, 1),), (ids(2, 1, 4),)),
    Case("Tile", (floats(3, 2),), (ids(2, 3),)),
    Case("Pad", (X,), (ids(0, 1, 0, 2, 0, 1), np.float32(2))),
    Case("ConstantOfShape", (), (ids(2, 0, 3),)),
    Case("ConstantOfShape", (), (ids(2),), {"value": helper.make_tensor("v", I64, [1], [-1])}),
    Case("Range", (), (np.int64(1), np.int64(7), np.int64(2))),
    Case("OneHot", (ids(0, 2, -1),), (np.int64(3), floats(2))),
    Case("Trilu", (X,), (np.int64(1),), {"upper": 0}),
    Case("Trilu", (X,)),
    Case("NonZero", (WHOLE % 3,)),
    Case("EyeLike", (WHOLE,), attributes={"dtype": F32}),
    Case("Dropout", (X,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_it_does_in_onnx_runtime(case: Case) -> None:
    proto = model(case)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {f"x{i}": array for i, array in enumerate(case.inputs)}
    expected = session.run(None, inputs)
    with torch.no_grad():
        results = OnnxModule(proto)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    for ours, theirs in zip(results.values(), expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(np.asarray(theirs)))


def test_all_operators_have_a_case() -> None:
    named = {f"{case.domain}.{case.name}".lstrip(".") for case in CASES}
    # opsets from 20 on and what torch's exporters write are tested with whole files
    assert {n for n in TABLE if not n.startswith("moec.")} - named == {"Gelu", "RMSNormalization"}


REFUSED = [
    (Case("CumSum", (X,), (np.int64(1),), {"reverse": 1}), "CumSum in reverse, or exclusive"),
    (Case("ArgMax", (X,), attributes={"select_last_index": 1}), "ArgMax of the last of equal"),
    (Case("Slice", (X,), (ids(-1), ids(0), ids(2), ids(-1))), "Slice with a negative step"),
    (Case("Pad", (X,), (ids(0, 1, 0, 0, 1, 0),), {"mode": "edge"}), "Pad with b'edge'"),
    (
        Case("ScatterND", (X, np.array([[1]]), floats(1, 3, 4)), attributes={"reduction": "mul"}),
        "ScatterND with mul",
    ),
    (Case("Reshape", (X, ids(6, 4))), "data decide a size or an axis"),
    (Case("Cast", (X,), attributes={"to": TensorProto.STRING}), "elements of type 8"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_an_operator_cannot_do_is_refused(case: Case, words: str) -> None:
    inputs = {f"x{i}": torch.from_numpy(array) for i, array in enumerate(case.inputs)}
    with pytest.raises(CaptureError, match=f"the node {case.name}.*: .*{words}"):
        OnnxModule(model(case))(**inputs)
