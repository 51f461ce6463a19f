"""ONNX files that torch's exporter writes: their MoE blocks are recognised, as those of the model
are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

import moec
from moec.errors import CaptureError, UsageError
from moec.sources.onnx import open_onnx
from tests.models.families import FAMILIES

D, H, E = 8, 12, 4
AXES = {0: "batch", 1: "sequence"}


class Routed(nn.Module):
    """The best two of four experts, each a loop's turn over its rows."""

    def __init__(self, renormalised: bool = False, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.renormalised = renormalised
        self.router = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), activation(), nn.Linear(H, D)) for _ in range(E)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, D)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.combine(rows, weights, chosen).reshape(x.shape)

    def combine(
        self, rows: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            y = y.index_add(0, row, expert(rows[row]) * weights[row, slot, None])
        return y


class Stacked(Routed):
    """All experts as batched products, weighed by a dense table."""

    def __init__(self) -> None:
        super().__init__(renormalised=True)
        self.experts = nn.ModuleList()
        self.up, self.gate = (nn.Parameter(torch.randn(E, D, H) / 3) for _ in range(2))
        self.down = nn.Parameter(torch.randn(E, H, D) / 3)

    def combine(
        self, rows: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        table = torch.zeros(rows.shape[0], E).scatter(1, chosen, weights)
        hidden = F.silu(rows[None] @ self.gate) * (rows[None] @ self.up)
        return (hidden @ self.down * table.T[..., None]).sum(0)


class Sorted(Stacked):
    """Weights of the chosen experts are gathered for each row."""

    def combine(
        self, rows: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.einsum("td,tkdh->tkh", rows, self.up[chosen]).relu()
        y = torch.einsum("tkh,tkhd->tkd", hidden, self.down[chosen])
        return (y * weights[..., None]).sum(1)


def export(model: nn.Module, path: Path, *inputs: torch.Tensor, opset: int = 18) -> Path:
    names = ["x", "mask"][: len(inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), inputs, str(path), dynamo=False, opset_version=opset, input_names=names,
            output_names=["y"], dynamic_axes=dict.fromkeys(names, AXES),
        )  # fmt: skip
    return path


def in_onnx_runtime(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(result)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "loop": Routed,
    "renormalised": lambda: Routed(renormalised=True),
    "stacked": Stacked,
    "gathered": Sorted,
    "within a model": lambda: nn.Sequential(nn.Linear(D, D), Stacked(), nn.LayerNorm(D), Stacked()),
}


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_recognised_and_equal_onnx_runtime(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export(MODELS[name](), tmp_path / "model.onnx", torch.randn(2, 5, D))
    compiled = moec.compile(path)
    blocks = [(block.top_k, block.experts) for block in compiled.blocks]
    assert blocks == [(2, E)] * (2 if name == "within a model" else 1)
    assert compiled.report().notes[-1] == (
        "model.onnx: read as ONNX Runtime computes it, compared on two drawn inputs"
    )
    for shape in ((1, 1), (3, 4), (2, 17)):
        x = torch.randn(*shape, D)
        torch.testing.assert_close(
            compiled(x=x)["y"], in_onnx_runtime(path, x=x), rtol=1e-4, atol=1e-5
        )


def test_a_family_of_transformers(tmp_path: Path) -> None:
    few = FAMILIES["mixtral"].one_layer()
    torch.manual_seed(0)
    model = few.build()
    model.set_experts_implementation("batched_mm")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            logits = self.model(input_ids=x, attention_mask=mask, use_cache=False).logits
            assert isinstance(logits, torch.Tensor)
            return logits

    ids = torch.randint(3, 160, (2, 7))
    path = export(Logits(), tmp_path / "mixtral.onnx", ids, torch.ones_like(ids))
    compiled = moec.compile(path)
    (block,) = compiled.blocks
    assert block.name == "model.model.layers.0.mlp.experts.ReduceSum"
    assert (block.router, block.activation) == ("softmax, top-2, renormalised", "swiglu")
    ids, mask = torch.randint(3, 160, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    unpadded = mask.bool()
    expected = in_onnx_runtime(path, x=ids, mask=mask)[unpadded]
    torch.testing.assert_close(
        compiled(x=ids, mask=mask)["y"][unpadded], expected, rtol=1e-4, atol=1e-4
    )


def test_a_file_is_written_back_with_moe_nodes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Routed(renormalised=True, activation=nn.ReLU)
    path = export(model, tmp_path / "loop.onnx", torch.randn(2, 5, D))
    compiled = moec.compile(path, verify=False, build=False)
    compiled.export_onnx(tmp_path / "moe.onnx", moe="op")
    nodes = onnx.load(tmp_path / "moe.onnx").graph.node
    assert [node.op_type for node in nodes].count("MoE") == 1


def test_16_bit_weights_and_other_names(tmp_path: Path) -> None:
    weight = torch.randn(4, 3).half()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input.1", "w/0"], ["y:0"], name="/a/../b c")],
        "g",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT16, ["n n", 4])],
        [helper.make_tensor_value_info("y:0", TensorProto.FLOAT16, None)],
        [onnx.numpy_helper.from_array(weight.numpy(), "w/0")],
    )
    path = write(graph, tmp_path)
    compiled = moec.compile(path)
    x = torch.randn(5, 4).half()
    torch.testing.assert_close(compiled(**{"input.1": x})["y:0"], x @ weight, rtol=1e-2, atol=1e-2)


def write(graph: onnx.GraphProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def simple(*nodes: onnx.NodeProto, shape: tuple[object, ...] = ("n", 4)) -> onnx.GraphProto:
    return helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )


RELU = helper.make_node("Relu", ["x"], ["y"])
UNREAD = [helper.make_node("Relu", ["x"], ["a"])]
UNREAD += [helper.make_node("Sinh", [name], [name + "a"]) for name in ("a", "aa")]
UNREAD += [helper.make_node("BiasGelu", ["aaa", "aaa"], ["y"], domain="com.microsoft")]
REFUSED = [
    (
        simple(*UNREAD),
        r"operators of ONNX that moec does not read: Sinh \(2\), com.microsoft.BiasGelu \(1\); "
        "export the model again",
    ),
    (simple(RELU, shape=("a", "b", "c", "d", "e", "f")), "its inputs name more than 5 sizes: a, b"),
    (simple(RELU, shape=(2**20, 2**20)), r"the input x is too large for an example: \[1048576, "),
    (simple(RELU, shape=(None, 4)), "the input x has no name for its axis 0"),
    (simple(helper.make_node("Relu", ["z"], ["y"])), "it cannot be compared with ONNX Runt.*z"),
]


@pytest.mark.parametrize(
    ("graph", "words"), REFUSED, ids=["operators", "sizes", "large", "axis", "edge"]
)
def test_refusals(graph: onnx.GraphProto, words: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=f"model.onnx: {words}"):
        open_onnx(write(graph, tmp_path))
    onnx.save(helper.make_model(graph, producer_name="moec"), path := tmp_path / "model.onnx")
    with pytest.raises(CaptureError, match="moec export wrote this file: compile the model that"):
        open_onnx(path)


def test_another_result_than_onnx_runtimes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        importlib_table(), "Relu", lambda attributes, x: x.relu() * torch.tensor(1.001)
    )
    with pytest.raises(CaptureError, match=r"ONNX Runtime computes another y: the error is \d"):
        open_onnx(write(simple(RELU), tmp_path))


def importlib_table() -> dict[str, object]:
    from moec.sources.onnx import module

    return module.TABLE  # type: ignore[return-value]


@pytest.mark.parametrize("content", [b"", b"\x08", b"not a model", b"\xff" * 400])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"model\.onnx"):
        moec.compile(path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "absent.bin"])
def test_weights_outside_of_the_folder_are_not_read(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    weight = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    graph = simple(helper.make_node("Mul", ["x", "w"], ["y"]))
    graph.initializer.append(weight)
    path = folder / "model.onnx"
    opsets = [helper.make_opsetid("", 18)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    )
    with pytest.raises(CaptureError, match="cannot be read as an ONNX file"):
        open_onnx(path)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    weight = onnx.TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[2**40], raw_data=bytes(8)
    )
    graph = simple(helper.make_node("Mul", ["x", "w"], ["y"]))
    graph.initializer.append(weight)
    with pytest.raises(CaptureError, match=r"the tensor 'w' cannot be read"):
        open_onnx(write(graph, tmp_path))


def test_adapters_are_for_checkpoints(tmp_path: Path) -> None:
    path = write(simple(RELU), tmp_path)
    with pytest.raises(UsageError):
        moec.compile(path, adapters=[tmp_path])
