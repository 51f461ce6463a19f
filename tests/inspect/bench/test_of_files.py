"""Baselines that run a file: their inputs, and the files that are refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from moec.commands.bench import command
from moec.errors import UsageError
from moec.inspect.bench.of_files import of_files


def cached(path: Path, *, past: bool = True) -> Path:
    """A file whose logits are the token, how many places the mask counts, and how many the cache
    holds; each token is kept as a key."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["ones"], value_ints=[1, 3]),
        helper.make_node("Unsqueeze", ["ids", "ones"], ["key"]),
        helper.make_node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        helper.make_node("ReduceSum", ["attention_mask"], ["counted"], keepdims=1),
        helper.make_node("Cast", ["counted"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["present.0.key", "last"], ["held"], keepdims=1),
        helper.make_node("ReduceSum", ["held", "middle"], ["kept"], keepdims=1),
        helper.make_node("Squeeze", ["kept", "first"], ["flat"]),
        helper.make_node("Expand", ["flat", "shape"], ["sums"]),
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Expand", ["mask", "shape"], ["masks"]),
        helper.make_node("Unsqueeze", ["ids", "at"], ["a"]),
        helper.make_node("Unsqueeze", ["masks", "at"], ["b"]),
        helper.make_node("Unsqueeze", ["sums", "at"], ["c"]),
        helper.make_node("Concat", ["a", "b", "c"], ["logits"], axis=2),
    ]
    order = [*nodes[:9], nodes[10], nodes[9], *nodes[11:]]
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", TensorProto.INT64, ["B", "S"]),
        value("attention_mask", TensorProto.INT64, ["B", "L"]),
        value("past_key_values.0.key", TensorProto.FLOAT, ["B", 1, "P", 1]),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, ["B", "S", 3]),
        value("present.0.key", TensorProto.FLOAT, ["B", 1, "L", 1]),
    ]
    axes = {"last": [3], "middle": [2], "first": [1, 2], "at": [2]}
    weights = [helper.make_tensor(n, TensorProto.INT64, [len(a)], a) for n, a in axes.items()]
    graph = helper.make_graph(order, "main", inputs, outputs if past else outputs[:1], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_cache_is_handed_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (contender,) = of_files([name], [cached(tmp_path / "m.onnx")], 1)
    for _ in range(2):  # a new session starts empty
        session = contender.open(1, 8)
        results = [session.feed(tokens).tolist() for tokens in ([[5, 6, 7]], [[9]], [[2]])]
        assert results == [[[7, 3, 18]], [[9, 4, 27]], [[2, 5, 29]]]


def test_what_is_refused(tmp_path: Path) -> None:
    file = cached(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"onnxruntime runs a file of yours: give one with --fil"):
        of_files(["onnxruntime"], [], 1)
    with pytest.raises(UsageError, match=r"x\.onnx: there is no such file"):
        of_files(["onnxruntime"], [tmp_path / "x.onnx"], 1)
    with pytest.raises(UsageError, match=r"m\.gguf: no --baseline reads a \.gguf file"):
        of_files(["onnxruntime"], [file, tmp_path / "m.gguf"], 1)
    with pytest.raises(UsageError, match="its inputs must be input_ids and past_key_values"):
        of_files(["onnxruntime"], [cached(tmp_path / "n.onnx", past=False)], 1)


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError, match=r"llama\.cpp needs its package: pip install llama-cpp-py"):
        of_files(["llama.cpp"], [tmp_path / "m.gguf"], 1)


def test_an_artifact_cannot_be_quantised(tmp_path: Path) -> None:
    (tmp_path / "m.moec").touch()
    words = [str(tmp_path / "m.moec"), "--quant", "int8", "-q"]
    with pytest.raises(UsageError, match="--quant is for a model that is compiled here"):
        command.main(words, standalone_mode=False)
