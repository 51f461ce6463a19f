"""From recognised blocks to grouped kernels: each pass's result, refusals, and exactness.

One layer with all features, as recognition returns it; the result of each pass is a golden file.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.lower.expand_experts import ExpandExperts
from moec.passes.lower.fuse_activation import FuseActivation
from moec.passes.lower.fuse_dispatch import FuseDispatch
from moec.passes.lower.fuse_gate import FuseGate
from moec.passes.simplify.fold_addend import FoldAddend
from moec.passes.simplify.split_packed import SplitPacked

BODY = """
    gu: f32[R, 12] = aten.linear.default(bx, b1, bb)
    g: f32[R, 6] = aten.slice.Tensor(gu) <dim=-1, start=0, end=6>
    u: f32[R, 6] = aten.slice.Tensor(gu) <dim=-1, start=6, end=12>
    a: f32[R, 6] = aten.silu.default(g)
    h: f32[R, 6] = aten.mul.Tensor(a, u)
    y: f32[R, 8] = aten.linear.default(h, b2)
    return y"""


def layer(
    *,
    body: str = BODY,
    logits: str = "logits: f32[T, 4] = aten.linear.default(x, router) @ mlp.gate",
    dispatch: str = "x, i",
    add: str = "z: f32[T, 8] = aten.add.Tensor(y, s) @ mlp",
) -> Graph:
    return parse(f"""
    graph main(x: f32[T, 8], s: f32[T, 8];
               router: f32[4, 8], w1: f32[4, 12, 8], b: f32[4, 12], w2: f32[4, 8, 6]) {{
      size T in [0, inf]
      {logits}
      w: f32[T, 2], i: i64[T, 2] = moe.route(logits) <k=2, renormalize=true> @ mlp.gate
      rows: f32[2*T, 8], order: i32[2*T], ends: i32[4] =
        moe.dispatch({dispatch}) <num_experts=4> @ mlp
      out: f32[2*T, 8] = moe.experts(rows, ends, w1, b, w2) <form="hf"> @ mlp.experts {{
        graph body(bx: f32[R, 8]; b1: f32[12, 8], bb: f32[12], b2: f32[8, 6]) {{ {body} }}
      }}
      y: f32[T, 8] =
        moe.combine(out, order, w) <k=2, tokens={{T}}, dtype=f32, weighted=true> @ mlp
      {add}
      return z
    }}""")


PASSES = (
    FuseGate(),
    SplitPacked(),
    FoldAddend(),
    ExpandExperts(),
    FuseActivation(),
    FuseDispatch(),
)


def steps(graph: Graph, passes=PASSES, weights=None) -> list[PassResult]:
    return run(Program(graph, weights or {}), passes, stage=Stage.MOE)


@pytest.mark.parametrize("index", range(len(PASSES)), ids=[p.name for p in PASSES])
def test_text(index, golden):
    golden(print_graph(steps(layer())[index + 1].program.graph))


def declined(graph: Graph, pass_name: str) -> str:
    (step,) = [s for s in steps(graph) if s.name == pass_name]
    return "; ".join(d.reason for d in step.declined)


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        ("logits: f32[T, 4] = aten.slice.Tensor(x) <dim=1, start=0, end=4>", "from aten.slice"),
        (
            "wide: f32[4, 8] = aten.mul.Tensor(router, router)\n"
            "logits: f32[T, 4] = aten.linear.default(x, wide)",
            "weight wide is computed",
        ),
    ],
)
def test_fuse_gate_declines(logits, says):
    graph = layer(logits=logits)
    assert says in declined(graph, "fuse-gate")
    assert "moe.gate" not in print_graph(steps(graph)[1].program.graph)


def test_fuse_gate_declines_logits_with_other_readers():
    graph = layer(
        add="q: f32[T, 4] = aten.silu.default(logits)\n"
        "z: f32[T, 8] = aten.add.Tensor(y, s)\n state s -> z"
    )
    assert "logits have other readers" in declined(graph, "fuse-gate")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (BODY.replace("aten.silu.default", "aten.sort.default"), "holds aten.sort.default"),
        (
            "p: f32[12] = aten.sum.dim_IntList(b1) <dim=(1)>\n"
            "c: f32[R, 12] = aten.linear.default(bx, b1, p)\n"
            "d: f32[R, 6] = aten.slice.Tensor(c) <dim=-1, end=6>\n"
            "y: f32[R, 8] = aten.linear.default(d, b2)\n return y",
            "computes aten.sum.dim_IntList from its weights alone",
        ),
        ("c: f32[R, 12] = aten.linear.default(bx, b1)\n"
         "y: f32[R, 8] = aten.linear.default(c, c)\n return y", "does not multiply rows"),
        ("y: f32[12, 8] = aten.relu.default(b1)\n return y", "does not depend on its rows"),
        ("m: f32[R, 8] = aten.add.Tensor(bx, b2)\n return m", "expert uses its weight b2"),
    ],
    ids=["an op of no row", "an op of weights", "rows by rows", "no rows", "a matrix added"],
)  # fmt: skip
def test_expand_experts_declines(body, says):
    graph = layer(body=body)
    step = run(Program(graph, {}), [ExpandExperts()], stage=Stage.MOE)[-1]
    assert says in "; ".join(d.reason for d in step.declined)
    assert any(op.name == "moe.experts" for op in step.program.graph.ops)


OPERANDS = {
    "a vector": ("b: f32[4, 12]", "bb: f32[12]", "d: f32[R, 12] = aten.mul.Tensor(c, bb)"),
    "one number": ("b: f32[4]", "bb: f32[]", "d: f32[R, 12] = aten.mul.Tensor(c, bb)"),
    "one number on the left": ("b: f32[4]", "bb: f32[]", "d: f32[R, 12] = aten.sub.Tensor(bb, c)"),
    "a vector of each head": (
        "b: f32[4, 4]",
        "bb: f32[4]",
        "v: f32[R, 3, 4] = aten.reshape.default(c) <shape=({R}, 3, 4)>\n"
        "m: f32[R, 3, 4] = aten.mul.Tensor(v, bb)\n"
        "d: f32[R, 12] = aten.reshape.default(m) <shape=({R}, 12)>",
    ),
    "a threshold": (
        "b: f32[4]",
        "bb: f32[]",
        "g: bool[R, 12] = aten.gt.Tensor(c, bb)\n"
        "d: f32[R, 12] = aten.where.self(g, c, bb)",
    ),
}  # fmt: skip
"""What an expert computes with a param that no linear layer holds: the stack of its values, its
declaration in the body, and the ops."""


@pytest.mark.parametrize("tokens", [0, 4, 5, 6])
@pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS)
def test_params_of_row_wise_ops_are_gathered(operand, tokens):
    """Of 6 tokens, there are 12 rows of 12 elements: operands that meet from the wrong side would
    be a wrong number, not an error."""
    stack, declared, ops = operand
    body = (
        f"c: f32[R, 12] = aten.linear.default(bx, b1)\n{ops}\n"
        "e: f32[R, 6] = aten.slice.Tensor(d) <dim=-1, start=0, end=6>\n"
        "y: f32[R, 8] = aten.linear.default(e, b2)\n return y"
    )
    text = print_graph(layer(body="y: f32[R, 8] = aten.relu.default(bx)\nreturn y"))
    text = text.replace("y: f32[R, 8] = aten.relu.default(bx)", body).replace("return y\n", "", 1)
    text = text.replace("b: f32[4, 12]", stack).replace("bb: f32[12]", declared)
    graph = parse(text)
    assert not any(step.declined for step in steps(graph) if step.name == "expand-experts")
    check(graph, torch.randn(tokens, 8))


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("aten.linear.default(bx, b3)", "differ in width"),
        ("aten.linear.default(bx, b1, bb)", "has a bias and another has none"),
    ],
)
def test_fuse_activation_declines(second, says):
    wide = "1" if "width" in says else "12"
    text = print_graph(layer(body="y: f32[R, 8] = aten.relu.default(bx)\nreturn y"))
    text = text.replace("w2: f32[4, 8, 6]) {", f"w2: f32[4, 8, 12], w3: f32[4, {wide}, 8]) {{")
    text = text.replace("w1, b, w2)", "w1, b, w2, w3)")
    text = text.replace("b2: f32[8, 6])", f"b2: f32[8, 12], b3: f32[{wide}, 8])")
    text = text.replace(
        "y: f32[R, 8] = aten.relu.default(bx)",
        f"""g: f32[R, 12] = aten.linear.default(bx, b1)
        u: f32[R, {wide}] = {second}
        h: f32[R, 12] = aten.mul.Tensor(g, u)
        y: f32[R, 8] = aten.linear.default(h, b2)""",
    )
    assert says in declined(parse(text), "fuse-activation")


def check(graph: Graph, x: torch.Tensor, seed: int = 0) -> None:
    """After every pass the graph computes the same, up to the order of float32 sums of at most
    twelve terms near one."""
    torch.manual_seed(seed)
    weights = {p.name: torch.randn(p.shape) for p in graph.params}
    s = torch.randn_like(x)
    result = steps(graph, weights=weights)
    (expected,) = evaluate(graph, [x, s], weights)
    for step in result[1:]:
        (actual,) = evaluate(step.program.graph, [x, s], step.program.weights)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@given(tokens=st.integers(0, 9), seed=st.integers(0, 999), same=st.booleans())
def test_the_numbers_hold(tokens, seed, same):
    torch.manual_seed(seed)
    x = torch.randn(1, 8).expand(tokens, 8) if same else torch.randn(tokens, 8)
    check(layer(), x.contiguous(), seed)


@given(tokens=st.integers(0, 9), seed=st.integers(0, 999))
def test_the_numbers_hold_with_weights_on_the_input_side(tokens, seed):
    torch.manual_seed(seed)
    check(layer(dispatch="x, i, w"), torch.randn(tokens, 8), seed)


def test_nan_stays_with_its_token():
    x = torch.randn(4, 8)
    x[2, 3] = torch.nan
    check(layer(), x)


def test_interleaved_columns_are_cut_by_stride():
    body = BODY.replace("start=0, end=6", "start=0, end=12, step=2").replace(
        "start=6, end=12", "start=1, end=12, step=2"
    )
    graph = layer(body=body)
    assert "step=2" in print_graph(steps(graph)[2].program.graph)
    check(graph, torch.randn(5, 8))


@pytest.mark.parametrize(
    "add",
    [
        "z: f32[T, 8] = aten.add.Tensor(s, y)",
        "z: f32[T, 8] = aten.add.Tensor(y, s) <alpha=2>",
        "q: f32[T, 8] = aten.neg.default(y)\n p: f32[T, 8] = aten.add.Tensor(y, s)\n"
        "z: f32[T, 8] = aten.mul.Tensor(p, q)",
        "z: f32[T, 8] = aten.add.Tensor(y, y)",
    ],
    ids=["other way round", "alpha", "another reader", "itself"],
)
def test_what_is_added(add):
    check(layer(add=add), torch.randn(5, 8))


def test_an_addend_of_float64_is_not_added_by_zero_experts() -> None:
    graph = parse("""
    graph main(x: f64[T, 8], i: i64[T, 2], w: f64[T, 2], s: f64[T, 8];
               w1: f64[3, 8, 8]) {
      size T in [0, inf]
      rows: f64[2*T, 8], order: i32[2*T], ends: i32[3] = moe.dispatch(x, i) <num_experts=3>
      out: f64[2*T, 8] = moe.experts(rows, ends, w1) <form="hf"> {
        graph body(bx: f64[R, 8]; b1: f64[8, 8]) {
          y: f64[R, 8] = aten.linear.default(bx, b1)
          return y
        }
      }
      y: f64[T, 8] = moe.combine(out, order, w) <k=2, tokens={T}, dtype=f64, weighted=true>
      z: f64[T, 8] = moe.zero_experts(x, i, w) <first=3, kinds=("copy"), weighted=true, dtype=f64>
      a: f64[T, 8] = aten.add.Tensor(y, z)
      b: f64[T, 8] = aten.add.Tensor(a, s)
      return b
    }""")
    folded = steps(graph, (FoldAddend(),), {"w1": torch.ones(3, 8, 8)})[-1].program.graph
    assert sum(op.name == "aten.add.Tensor" for op in folded.ops) == 1
    torch.manual_seed(0)
    x, s = torch.randn(2, 50, 8, dtype=torch.float64)
    inputs = [x, torch.randint(0, 4, (50, 2)), torch.rand(50, 2, dtype=torch.float64), s]
    weights = {"w1": torch.randn(3, 8, 8, dtype=torch.float64)}
    expected, result = (evaluate(g, inputs, weights)[0] for g in (graph, folded))
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
