"""The MoE block in ONNX Runtime: any routing, and each expert only runs on rows that chose it."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec.codegen.onnx.lower import lower
from moec.codegen.onnx.profiles import PROFILES
from moec.errors import UnsupportedError
from moec.export.onnx import open_session, runner
from moec.ir.graph import Program
from tests.codegen.onnx.running import Run, agree, program, running, written
from tests.passes.forms.loops import Loop, SharedExpert
from tests.passes.forms.routers import Router, softmax_topk

D, H, E = 8, 6, 4
PARAMS = f"gate: f32[{E}, {H}, {D}], up: f32[{E}, {H}, {D}], down: f32[{E}, {D}, {H}]"
SWIGLU = f"""{{
  graph body(a: f32[R, {H}], b: f32[R, {H}]) {{
    s: f32[R, {H}] = aten.silu.default(a)
    m: f32[R, {H}] = aten.mul.Tensor(s, b)
    return m
  }}
}}"""


COMBINE = "moe.combine(d, s, w) <k=2, tokens={T}, dtype=f32, weighted=true>"
UNWEIGHTED = "moe.combine(d, s) <k=2, tokens={T}, dtype=f32>"


def block(
    routing: str = "<k=2, renormalize=true>",
    body: str = SWIGLU,
    combine: str = COMBINE,
    capacity: int = 0,
) -> Program:
    """logits, x -> y; a capacity leaves out choices beyond it."""
    limit = f"e: i64[T, 2] = moe.capacity(all) <num_experts={E}, capacity={capacity}>"
    ids = "e" if capacity else "all"
    return program(f"""
    graph main(logits: f32[T, {E}], x: f32[T, {D}]; {PARAMS}) {{
      size T in [0, 64]
      w: f32[T, 2], all: i64[T, 2] = moe.route(logits) {routing}
      {limit if capacity else ""}
      o: i32[2*T], s: i32[T, 2], n: i32[{E}] = moe.sort({ids}) <num_experts={E}>
      h: f32[2*T, {H}] = grouped.linear(x, n, gate, up, o)
        <matrices=2, dtype=f32, gather=2> {body}
      d: f32[2*T, {D}] = grouped.linear(h, n, down) <matrices=1, dtype=f32>
      y: f32[T, {D}] = {combine} @ moe
      return y
    }}""")


small = st.sampled_from((-1.0, 0.0, 1.0, math.nan))  # few values, so that many are equal
logits_of = st.lists(st.lists(small, min_size=E, max_size=E), max_size=7)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Program, Run]]:
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    plain, dropping = block(), block(capacity=1)
    return [(p, running(p, folder, opset=o)) for p in (plain, dropping) for o in (18, 23)]


@settings(max_examples=60)
@given(rows=logits_of)
def test_any_routing(runs: list[tuple[Program, Run]], rows: list[list[float]]) -> None:
    """Ties, NaN, empty experts, all rows on one, no tokens; choices beyond a capacity add
    nothing."""
    logits = torch.tensor(rows).reshape(-1, E)
    x = torch.linspace(-1, 1, len(rows) * D).reshape(-1, D)
    for module, run in runs:
        agree(module, run, [logits, x])


def test_an_expert_sees_the_rows_that_chose_it_and_no_others(tmp_path: Path) -> None:
    module = block()
    _, path = written(module, tmp_path)
    model = onnx.load(path, load_external_data=False)
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")]
    experts = [n for n in products if any(i.startswith(("gate.", "down.")) for i in n.input)]
    assert len(experts) == 2 * E
    for node in experts:
        model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    run = runner(open_session(path, model))
    logits = torch.tensor([[9.0, 8, 0, 0], [9, 0, 0, 8], [9, 8, 0, 0]])
    results = run({"logits": logits, "x": torch.randn(3, D)})
    counts = {0: 3, 1: 2, 2: 0, 3: 1}
    for node in experts:
        expert = int(node.input[1].split(".")[1])
        assert len(results[node.output[0]]) == counts[expert]


ROUTERS = {
    "softmax": "<k=2>",
    "sum of one": "<k=2, renormalize=true>",
    "sum and epsilon": "<k=2, renormalize=true, epsilon=0.1, scale=2.5>",
    "sigmoid": '<k=2, score="sigmoid">',
    "top-k, softmax": '<k=2, score="none", after="softmax">',
    "top-k, sigmoid": '<k=2, score="none", after="sigmoid">',
    "groups": "<k=2, groups=2, top_groups=1>",
    "groups by two": '<k=2, groups=2, top_groups=1, group_score="top2sum">',
    "sparsemixer": '<k=2, score="sparsemixer", jitter=0.1>',
    "rounded": '<k=2, score="sigmoid", score_dtype="bf16">',
    "rounded groups": '<k=2, groups=2, top_groups=1, group_score="top2sum", choice_dtype="f16">',
}


@pytest.mark.parametrize("moe", ["rows", "op"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router: str, moe: str, tmp_path: Path) -> None:
    """com.microsoft.MoE gets those that it cannot rank as logarithms of their weights."""
    module = block(ROUTERS[router])
    run = running(module, tmp_path, ep="cpu", moe=moe)
    for tokens in (1, 9, 33):
        agree(module, run, [torch.randn(tokens, E) * 3, torch.randn(tokens, D)])


@pytest.mark.parametrize("router", ROUTERS)
def test_nan_is_the_greatest_score(router: str, tmp_path: Path) -> None:
    module = program(f"""
    graph main(logits: f32[T, {E}]) {{
      size T in [0, 64]
      w: f32[T, 2], e: i64[T, 2] = moe.route(logits) {ROUTERS[router]}
      return w, e
    }}""")
    marks = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    logits = torch.cartesian_prod(*[marks] * E)[::4]
    agree(module, running(module, tmp_path), [logits])


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_of_float64_that_tie_in_float32(router: str, tmp_path: Path) -> None:
    module = program(f"""
    graph main(logits: f64[T, {E}]) {{
      size T in [0, 64]
      w: f64[T, 2], e: i64[T, 2] = moe.route(logits) {ROUTERS[router][:-1]}, dtype="f64">
      return w, e
    }}""")  # fmt: skip
    logits = 1 + torch.randn(40, E, dtype=torch.float64) * 1e-10
    agree(module, running(module, tmp_path), [logits], near=1e-14)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_float64_is_computed_in_float64(shared: bool, tmp_path: Path) -> None:
    module = SharedExpert(gated=True, first=False) if shared else Loop()
    module.router = Router(softmax_topk)
    module.double().eval()
    x = torch.randn(5, D, dtype=torch.float64)
    model = moec.compile(module, (x,), build=False, verify=False)
    model.export_onnx(tmp_path / "model.onnx", verify=False)
    (result,) = runner(open_session(tmp_path / "model.onnx"))({"x": x}).values()
    torch.testing.assert_close(result, module(x), rtol=1e-12, atol=1e-12)


def test_a_correction_chooses_and_does_not_weigh(tmp_path: Path) -> None:
    changed = program("""
    graph main(logits: f32[T, 6]; c: f32[6]) {
      size T in [0, 64]
      w: f32[T, 2], e: i64[T, 2] = moe.route(logits, c) <k=2, score="sigmoid">
      return w, e
    }""", scale=3)  # fmt: skip
    agree(changed, running(changed, tmp_path), [torch.randn(40, 6)])


def body(*lines: str, two: bool = True) -> str:
    second = f", b: f32[R, {H}]" if two else ""
    inner = "\n".join(lines)
    return f"{{ graph body(a: f32[R, {H}]{second}) {{\n{inner}\nreturn y\n}} }}"


def typed(text: str) -> str:
    name, expression = text.split(" = ")
    return f"{name}: f32[R, {H}] = aten.{expression}"


BODIES = {
    "gate last": ["s = silu.default(b)", "y = mul.Tensor(a, s)"],
    "clamped": [
        "g = clamp.default(a) <max=7.0>",
        "u = clamp.default(b) <min=-7.0, max=7.0>",
        "t = mul.Tensor(g) <other=1.702>",
        "s = sigmoid.default(t)",
        "p = mul.Tensor(g, s)",
        "q = add.Tensor(u) <other=1>",
        "y = mul.Tensor(q, p)",
    ],
}


CHECKS_OF_SIZES = {"Shape", "LessOrEqual", "Equal", "And", "Where", "Concat", "Reshape"}


@pytest.mark.parametrize("name", BODIES)
def test_activations_of_the_operator(name: str, tmp_path: Path) -> None:
    module = block(body=body(*map(typed, BODIES[name])))
    lowered, path = written(module, tmp_path, ep="cpu", moe="op")
    kinds = [n.kind for n in lowered.nodes()]
    assert kinds[-1] == "MoE"
    assert set(kinds[:-1]) <= CHECKS_OF_SIZES
    agree(module, runner(open_session(path)), [torch.randn(9, E), 9 * torch.randn(9, D)], 1e-4)


REFUSED = {
    "geglu": (
        {"body": body(*map(typed, ["s = gelu.default(a)", "y = mul.Tensor(s, b)"]))},
        "no activation_type of the CPU kernel computes the activation of these experts",
    ),
    "capacity": (
        {"capacity": 1},
        "the experts have a capacity, which the operator does not support",
    ),
    "unweighted": (
        {"combine": UNWEIGHTED},
        "the routing weights scale the experts' input, which the operator does not support",
    ),
    "negative": (
        {"routing": '<k=2, score="none">'},
        "the routing weights may be negative, and the operator computes a softmax",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_operator_cannot_express(name: str, tmp_path: Path) -> None:
    """It is named, with the way out; left to itself the block takes the other form."""
    changes, reason = REFUSED[name]
    module = block(**changes)
    with pytest.raises(UnsupportedError) as error:
        lower(module.graph, PROFILES["cpu"], 23, "op")
    message = (
        f'com.microsoft.MoE cannot express the block: {reason}; leave out moe="op" (1 time: at'
    )
    assert message in str(error.value)
    run = running(module, tmp_path, ep="cuda", moe="auto")
    agree(module, run, [torch.randn(9, E), torch.randn(9, D)])


def test_nodes_of_a_block(tmp_path: Path, golden) -> None:  # type: ignore[no-untyped-def]
    lowered, _ = written(block(), tmp_path)
    golden("\n".join(f"{n.outputs} = {n.kind} {n.inputs} {dict(n.attrs)}" for n in lowered.nodes()))
