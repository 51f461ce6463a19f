"""Experts of few bits in ONNX Runtime: as QMoE, and as sorted rows with a product per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moec
from moec.codegen.onnx.lower import lower
from moec.codegen.onnx.moe.encoding import Encoding
from moec.codegen.onnx.profiles import PROFILES
from moec.errors import TargetError, UnsupportedError, UsageError, VerificationError
from moec.export.onnx import open_session, runner
from moec.ir import text as ir_text
from moec.ir.formats.notation import parse
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import EXACT_ROWS, distance
from moec.passes.core.runner import Log
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.report.quantisation import with_exact_rows
from tests.codegen.onnx.running import Run, agree, program, running, written
from tests.passes.forms.loops import Loop
from tests.passes.forms.sizes import D as WIDTH

D, H, E = 64, 32, 4
FORMATS = ("int8", "int4", "int8:32", "int8:asymmetric", "int4:32:asymmetric", "mxfp4")
FORMATS += ("int3:32", "int2:32:asymmetric", "int6:32", "int5:asymmetric")
FORMS = {"op": ("cpu", "op"), "rows": ("cpu", "rows"), "portable": ("portable", "rows")}
SILU = "aten.silu.default(a)"
GELU = "aten.gelu.default(a)"


def block(
    format: str, act: str = SILU, routing: str = "<k=2>", bias: bool = False, hidden: int = H
) -> Program:
    """logits, x -> y, the rows exact."""
    two = f"gate: f32[{E}, {hidden}, {D}], up: f32[{E}, {hidden}, {D}]"
    biases = f", gb: f32[{E}, {hidden}], ub: f32[{E}, {hidden}], db: f32[{E}, {D}]" * bias
    flag = ", biased=true" * bias
    wide = program(f"""
    graph main(logits: f32[T, {E}], x: f32[T, {D}]; {two}, down: f32[{E}, {D}, {hidden}]{biases}) {{
      size T in [0, 64]
      w: f32[T, 2], e: i64[T, 2] = moe.route(logits) {routing}
      o: i32[2*T], s: i32[T, 2], n: i32[{E}] = moe.sort(e) <num_experts={E}>
      h: f32[2*T, {hidden}] = grouped.linear(x, n, gate, up{", gb, ub" * bias}, o)
        <matrices=2, dtype=f32, gather=2{flag}> {{
        graph body(a: f32[R, {hidden}], b: f32[R, {hidden}]) {{
          s: f32[R, {hidden}] = {act}
          m: f32[R, {hidden}] = aten.mul.Tensor(s, b)
          return m
        }}
      }}
      d: f32[2*T, {D}] = grouped.linear(h, n, down{", db" * bias}) <matrices=1, dtype=f32{flag}>
      y: f32[T, {D}] = moe.combine(d, s, w) <k=2, tokens={{T}}, dtype=f32, weighted=true> @ moe
      return y
    }}""")
    return with_exact_rows(QuantiseExperts(parse(format)).run(wide, Log()))


def near(program: Program, run: Run, inputs: list[torch.Tensor]) -> None:
    """Apart from the rounding of rows to 8 bits, of which this block has two."""
    (expected,) = evaluate(program.graph, inputs, program.weights)
    actual = run({v.name: t for v, t in zip(program.graph.inputs, inputs, strict=True)})["y"]
    assert actual.shape == expected.shape
    assert distance(actual, expected) <= EXACT_ROWS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format: str, form: str, tmp_path: Path) -> None:
    ep, moe = FORMS[form]
    torch.manual_seed(1)
    module = block(format, bias=True)
    lowered, path = written(module, tmp_path, ep=ep, moe=moe)
    kinds = {node.kind for node in lowered.nodes()}
    expected = {"op": "QMoE", "rows": "MatMulNBits", "portable": "DequantizeLinear"}
    assert kinds & set(expected.values()) == {expected[form]}
    near(module, runner(open_session(path)), [torch.randn(33, E) * 3, torch.randn(33, D)])


@pytest.mark.parametrize(
    ("format", "form"), [("int4:rows16", "op"), ("int4:32:rows16", "op"), ("mxfp4:rows16", "rows")]
)
def test_rows_of_16_bits_ask_for_rows_that_are_not_rounded(
    format: str, form: str, tmp_path: Path
) -> None:
    module = block(format, bias=True)
    lowered, path = written(module, tmp_path, ep="cpu", moe="auto")
    assert set(lowered.forms.values()) == {form}
    agree(module, runner(open_session(path)), [torch.randn(33, E) * 3, torch.randn(33, D)], 1e-5)


@pytest.mark.parametrize("form", ["rows", "portable"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [D, 24])
def test_rows_of_whole_numbers_are_exact(
    format: str, form: str, width: int, tmp_path: Path
) -> None:
    """A block whose greatest is 127 is rounded with a scale of 1: only the encoding is left."""
    if (width == 24 and ":32" in format) or (width == 24 and format == "mxfp4"):
        return  # blocks of 32 do not divide 24
    wide = program(f"""
    graph main(ids: i64[T, 1], x: f32[T, {width}]; up: f32[{E}, 7, {width}]) {{
      size T in [0, 64]
      o: i32[T], s: i32[T, 1], n: i32[{E}] = moe.sort(ids) <num_experts={E}>
      h: f32[T, 7] = grouped.linear(x, n, up, o) <matrices=1, dtype=f32, gather=1>
      return h
    }}""")
    changed = with_exact_rows(QuantiseExperts(parse(format)).run(wide, Log()))
    x = torch.randint(-127, 128, (19, width)).float()
    x[:, ::16] = 127
    run = running(changed, tmp_path, ep=FORMS[form][0])
    agree(changed, run, [torch.randint(E, (19, 1)), x], 2e-5)


ROUTERS = {
    "softmax": "<k=2>",
    "sum of one": "<k=2, renormalize=true>",
    "sigmoid": '<k=2, score="sigmoid">',
    "scaled": "<k=2, renormalize=true, epsilon=0.1, scale=2.5>",
    "groups": "<k=2, groups=2, top_groups=1>",
}


@pytest.mark.parametrize("router", ROUTERS)
def test_any_router_is_one_of_qmoe(router: str, tmp_path: Path) -> None:
    """Its weights reach the kernel as router_weights, and choose there too."""
    module = block("int8:32", routing=ROUTERS[router])
    run = running(module, tmp_path, ep="cpu", moe="op")
    for tokens in (1, 33):
        near(module, run, [torch.randn(tokens, E) * 3, torch.randn(tokens, D)])


small = st.integers(-1, 1).map(float)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Program, Run]]:
    folder, module = tmp_path_factory.mktemp("onnx"), block("int4:32")
    return [(module, running(module, folder, ep=ep, moe=moe)) for ep, moe in FORMS.values()]


@settings(max_examples=25)
@given(rows=st.lists(st.lists(small, min_size=E, max_size=E), max_size=7))
def test_any_routing(runs: list[tuple[Program, Run]], rows: list[list[float]]) -> None:
    """Ties, empty experts, all rows on one, no tokens."""
    logits = torch.tensor(rows).reshape(-1, E)
    x = torch.linspace(-1, 1, len(rows) * D).reshape(-1, D)
    for case, run in runs:
        near(case, run, [logits, x])


REFUSED = {
    "geglu": (
        {"act": GELU},
        "no activation_type of the CPU kernel computes the activation of these experts",
    ),
    "narrow": ({"hidden": 24}, "block_size 16 does not divide the 24 weights of a row"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_qmoe_cannot_express(name: str, tmp_path: Path) -> None:
    """It is named, with the way out; left to itself the block becomes rows."""
    changes, reason = REFUSED[name]
    module = block("int8", **changes)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError) as error:
        lower(module.graph, PROFILES["cpu"], 23, "op")
    message = f'com.microsoft.QMoE cannot express the block: {reason}; leave out moe="op"'
    assert message in str(error.value)
    lowered, path = written(module, tmp_path, ep="cpu", moe="auto")
    assert set(lowered.forms.values()) == {"rows"}
    near(module, runner(open_session(path)), [torch.randn(9, E), torch.randn(9, D)])


def test_qmoe_rounds_rows_that_meet_8_bits() -> None:
    with pytest.raises(UnsupportedError, match="rounds rows that are multiplied by 8-bit weights"):
        lower(block("int8:rows16").graph, PROFILES["cpu"], 23, "op")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("op", "supports integers, and the weights are fp8"),
        ("rows", "fp8 weights have no ONNX"),
    ],
)
def test_fp8_is_refused(form: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        lower(block("fp8").graph, PROFILES["cpu"], 23, form)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("op", "zero points are integers, and those of the weights are floats"),
        ("rows", "weights with float zeros have no ONNX form"),
    ],
)
def test_float_zeros_are_refused(form: str, words: str) -> None:
    text = ir_text.print_graph(block("int4:32:asymmetric").graph)
    graph = ir_text.parse(text.replace(".zeros: u8", ".zeros: bf16"))
    with pytest.raises(UnsupportedError, match=words):
        lower(graph, PROFILES["cpu"], 23, form)


def test_an_opset_without_blocks_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"opset 20 has no .*\(block_size\): choose opset 21"
    ):
        lower(block("int4").graph, PROFILES["portable"], 20)


def test_layers_that_are_no_experts_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(32, 32)
    compiled_model = moec.compile(
        model, (torch.randn(2, 32),), build=False, quant="linears=int8,head=int8"
    )
    with pytest.raises(UnsupportedError, match="have no ONNX form: quantise only the experts"):
        compiled_model.export_onnx(tmp_path / "m.onnx")


@pytest.fixture(scope="module")
def compiled() -> moec.CompiledModel:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = Loop()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.moe(x)

    rows = ({0: torch.export.Dim("T", min=0)},)
    x = torch.randn(5, WIDTH)
    return moec.compile(Block().eval(), (x,), dynamic_shapes=rows, build=False, quant="int8")


def test_the_door(compiled: moec.CompiledModel, tmp_path: Path) -> None:
    exported = compiled.export_onnx(tmp_path / "m.onnx", "portable")
    assert exported.quant == "int8"
    assert exported.errors["output"] <= exported.tolerance == EXACT_ROWS
    assert 0 < exported.moved[0].error < 0.02
    assert exported.parity == {"moe": 1.0}


def test_a_model_is_quantised_as_it_is_exported(tmp_path: Path) -> None:
    """To the file that a model quantised before gives."""
    rows = ({0: torch.export.Dim("T", min=0)},)
    torch.manual_seed(0)
    model, x = Loop().eval(), torch.randn(5, WIDTH)
    files = []
    for here in (True, False):
        before, after = (None, "int4") if here else ("int4", None)
        compiled_model = moec.compile(model, (x,), dynamic_shapes=rows, build=False, quant=before)
        written = compiled_model.export_onnx(tmp_path / "m.onnx", "cpu", after)
        assert (written.quant, len(written.moved)) == ("int4", 1)
        files.append((tmp_path / "m.onnx").read_bytes())  # its weights are small
    assert files[0] == files[1]


def test_a_quantised_model_is_not_quantised_again(
    compiled: moec.CompiledModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="compiled with quant='int8': export it without quant"):
        compiled.export_onnx(tmp_path / "m.onnx", quant="int4")
    assert not list(tmp_path.iterdir())


def test_standard_operators_cannot_ask_for_rows_of_16_bits(tmp_path: Path) -> None:
    """Which is said, and true: with the option that is named the rows are as they were."""
    torch.manual_seed(0)
    model = moec.compile(Loop().eval(), (torch.randn(5, WIDTH),), build=False, quant="int8:rows16")
    written = model.export_onnx(tmp_path / "m.onnx", "portable")
    (note,) = written.notes
    key = "session.qdq_matmulnbits_accuracy_level"
    assert note.startswith("rows16 cannot be written")
    assert key in note
    assert 1e-3 < written.errors["output"] <= written.tolerance == EXACT_ROWS
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(key, "1")
    x = torch.randn(5, WIDTH)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    program = with_exact_rows(model.pass_results[-1].program)
    (expected,) = evaluate(program.graph, [x], program.weights)
    assert distance(torch.from_numpy(actual), expected) < 1e-5


def test_cuda_is_refused(compiled: moec.CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match='with ep="cuda" leave out quant, or choose ep="cpu"'):
        compiled.export_onnx(tmp_path / "m.onnx", "cuda")


@pytest.mark.parametrize("ep", ["cpu", "portable"])
def test_a_wrong_scale_leaves_no_file(
    compiled: moec.CompiledModel, ep: str, tmp_path: Path, monkeypatch: Any
) -> None:
    right = Encoding.scales
    monkeypatch.setattr(Encoding, "scales", lambda *args: right(*args) * 1.1)
    with pytest.raises(VerificationError, match="no file was written: in ONNX Runtime output"):
        compiled.export_onnx(tmp_path / "m.onnx", ep)
    assert not list(tmp_path.iterdir())
