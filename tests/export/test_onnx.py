"""The ONNX export: the content of the file, the checks before it is named, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import moec
from moec.codegen.onnx.rules import BUILD
from moec.errors import MoecError, TargetError, UnsupportedError, UsageError, VerificationError
from tests.passes.forms.loops import Loop, SharedExpert
from tests.passes.forms.routers import softmax_topk
from tests.passes.forms.sizes import D
from tests.passes.forms.stacks import Gathered, InputSide

ROWS = ({0: torch.export.Dim("T", min=0)},)


class Block(nn.Module):
    """A residual block with a loop over experts, as people write it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.moe = Loop(**options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(x)


def compiled(module: nn.Module, **options: object) -> moec.CompiledModel:
    model = module.to(options.get("dtype", torch.float32)).eval()  # type: ignore[arg-type]
    x = torch.randn(5, D, dtype=next(model.parameters()).dtype)
    return moec.compile(model, (x,), dynamic_shapes=ROWS, build=False)


@pytest.fixture(scope="module")
def block() -> moec.CompiledModel:
    torch.manual_seed(0)
    return compiled(Block())


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("ep", ["cpu", "cuda", "portable"])
@pytest.mark.parametrize("opset", [18, None, 25])
def test_equals_eager(
    block: moec.CompiledModel, ep: str, opset: int | None, tmp_path: Path
) -> None:
    exported = block.export_onnx(tmp_path / "model.onnx", ep, opset=opset)
    assert exported.errors["output"] <= 1e-6
    assert exported.parity == {"moe": 1.0}
    run = session(tmp_path / "model.onnx")
    for tokens in (0, 1, 40):
        x = torch.randn(tokens, D)
        (actual,) = run.run(None, {"x": x.numpy()})
        (expected,) = block.captured.eager(x)
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-5, atol=1e-6)


FORMS = {
    "gathered": Gathered,
    "shared expert": lambda: SharedExpert(gated=True, first=False),
    "input side": InputSide,
}


@pytest.mark.parametrize("form", FORMS)
def test_however_it_is_written(form: str, tmp_path: Path) -> None:
    model = moec.compile(FORMS[form]().eval(), (torch.randn(5, D),), build=False)
    exported = model.export_onnx(tmp_path / "model.onnx")
    assert list(exported.forms.values()) == ["rows"]
    assert exported.errors["output"] <= 1e-5


def test_without_fusions(tmp_path: Path) -> None:
    """Level 0 leaves the dispatch and the activation by themselves."""
    model = moec.compile(
        Block().eval(), (torch.randn(5, D),), dynamic_shapes=ROWS, build=False, opt_level=0
    )
    assert model.export_onnx(tmp_path / "model.onnx").errors["output"] <= 1e-6


def test_what_stands_in_the_file(block: moec.CompiledModel, tmp_path: Path) -> None:
    block.export_onnx(tmp_path / "model.onnx", "portable")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert (model.producer_name, model.opset_import[0].version) == ("moec", 23)
    assert {opset.domain for opset in model.opset_import} == {""}
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert about["moec.ep"] == "portable"
    assert "recognise-experts" in about["moec.passes"]
    assert about["moec.moe"] == '{"moe": "rows"}'
    (x,) = model.graph.input
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["T", D]
    assert [output.name for output in model.graph.output] == ["output"]
    assert any(node.name.startswith("moe") for node in model.graph.node)
    large = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in large:
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert where["location"] == "model.onnx.data"
        assert int(where["offset"]) % 4096 == 0


def test_the_number_of_nodes_is_that_of_the_experts(tmp_path: Path) -> None:
    """It does not depend on the tokens of the example."""
    counts = set()
    for tokens in (2, 50):
        model = moec.compile(
            Block().eval(), (torch.randn(tokens, D),), dynamic_shapes=ROWS, build=False
        )
        counts.add(model.export_onnx(tmp_path / "model.onnx").moe_nodes)
    assert len(counts) == 1


def test_a_wrong_number_leaves_no_file(
    block: moec.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BUILD["moe.combine"]
    monkeypatch.setitem(BUILD, "moe.combine", lambda c: c.w("Neg", str(right(c))))
    with pytest.raises(VerificationError) as error:
        block.export_onnx(tmp_path / "model.onnx")
    assert str(error.value).startswith("no file was written: in ONNX Runtime output differs")
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_leaves_no_file(
    block: moec.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case but the example's size."""
    right = BUILD["moe.combine"]

    def fixed(c):  # type: ignore[no-untyped-def]
        return c.w("Reshape", str(right(c)), c.w.constant([5, D]))

    monkeypatch.setitem(BUILD, "moe.combine", fixed)
    with pytest.raises(VerificationError, match=r"in ONNX Runtime the file fails for x \(1, 8\)"):
        block.export_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_parity_sees_other_choices(
    block: moec.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token sent to experts 0 and 1, with a tolerance that allows anything."""
    right = BUILD["moe.gate"]

    def first(c):  # type: ignore[no-untyped-def]
        weights, _ = right(c)
        experts = c.w("Range", *(c.w.constant(n) for n in (0, c.out.shape[1], 1)))
        return weights, c.w("Expand", experts, c.w("Shape", weights))

    monkeypatch.setitem(BUILD, "moe.gate", first)
    exported = block.export_onnx(tmp_path / "model.onnx", verify=10.0)
    assert exported.parity["moe"] < 0.9


def test_an_older_file_is_replaced_whole(block: moec.CompiledModel, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    path.with_name("model.onnx.data").write_text("old")
    block.export_onnx(path)
    assert session(path).get_inputs()[0].name == "x"
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names <= {"model.onnx", "model.onnx.data"}


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported = compiled(Block(), dtype=torch.float16).export_onnx(tmp_path / "model.onnx")
    assert exported.errors["output"] <= exported.tolerance < 1e-2


def test_bfloat16(tmp_path: Path) -> None:
    """For CUDA it is written and checked; it is not run, and that is said."""
    model = compiled(Block(), dtype=torch.bfloat16)
    with pytest.raises(TargetError, match="the model computes in bf16, in which ONNX Runtime's"):
        model.export_onnx(tmp_path / "model.onnx", "cpu")
    exported = model.export_onnx(tmp_path / "model.onnx", "cuda")
    assert exported.notes == (
        "the file was checked but not run: ONNX Runtime's CPU kernels do not compute in bfloat16",
    )
    assert not exported.errors
    assert exported.forms == {"moe": "op"}
    other = compiled(Block(rule=softmax_topk), dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="round the logarithms of the weights to bf16"):
        other.export_onnx(tmp_path / "model.onnx", "cuda", moe="op")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def test_cuda_says_what_was_not_tried(block: moec.CompiledModel, tmp_path: Path) -> None:
    exported = block.export_onnx(tmp_path / "model.onnx", "cuda")
    assert "written for CUDA and checked on the CPU: no CUDA kernel was run" in exported.notes


WRONG = [
    ({"ep": "tpu"}, "unknown execution provider 'tpu': choose cpu, cuda, portable"),
    ({"opset": 17}, "opset 17 is not supported: choose 18 to 25, or none"),
    ({"moe": "dense"}, "moe is 'dense': choose auto, op, rows"),
    ({"ep": "portable", "moe": "op"}, "com.microsoft.MoE is no standard operator"),
    ({"verify": -1}, "verify is -1"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_options(
    block: moec.CompiledModel, options: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(MoecError) as error:
        block.export_onnx(tmp_path / "model.onnx", **options)  # type: ignore[arg-type]
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_wrong_paths(block: moec.CompiledModel, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "model.pb", "give the file a name that ends in .onnx"),
        (tmp_path / "none" / "model.onnx", "the folder"),
        (5, "5 is not the path of a file: give text or a Path"),
    ):
        with pytest.raises(UsageError, match=words):
            block.export_onnx(path)  # type: ignore[arg-type]


def test_passes_that_stopped(tmp_path: Path) -> None:
    model = moec.compile(Block().eval(), (torch.randn(5, D),), stop_after="recognise", build=False)
    with pytest.raises(UsageError, match="the passes stopped after recognise-mixtures"):
        model.export_onnx(tmp_path / "model.onnx")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * self.seen


def test_states(tmp_path: Path) -> None:
    model = moec.compile(Counting().eval(), (torch.randn(5, D),), build=False)
    with pytest.raises(UnsupportedError, match="keeps 1 buffers between calls"):
        model.export_onnx(tmp_path / "model.onnx")


class Same(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * 2
        return y, y, x.view(-1, 2, 4)


def test_results_that_are_the_same(tmp_path: Path) -> None:
    """Each output has a name of its own."""
    model = moec.compile(Same(), (torch.randn(5, 8),), build=False)
    exported = model.export_onnx(tmp_path / "model.onnx")
    assert len(exported.errors) == 3
    assert set(exported.errors.values()) == {0.0}


def test_an_input_that_is_passed_on(tmp_path: Path) -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + y

    model = moec.compile(Through(), (torch.randn(5, 8), torch.randn(5, 8)), build=False)
    assert set(model.export_onnx(tmp_path / "m.onnx").errors.values()) == {0.0}
