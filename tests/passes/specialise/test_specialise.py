"""specialise: constant inputs, and the experts that become unreachable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.options import parse_pass
from moec.passes.core.rewrite import drop_dead
from moec.passes.core.runner import PassResult, run
from moec.passes.specialise.bind_inputs import bind
from moec.passes.specialise.specialise import Specialise
from moec.passes.specialise.token_invariant import TokenInvariantAnalysis

EXPERTS = """
  rows: f32[K*B, 8], order: i32[K*B], ends: i32[4] = moe.dispatch(x, i) <num_experts=4> @ mlp
  out: f32[K*B, 8] = moe.experts(rows, ends, w1, w2) @ mlp.experts {
    graph body(bx: f32[R, 8]; b1: f32[6, 8], b2: f32[8, 6]) {
      h: f32[R, 6] = aten.linear.default(bx, b1)
      a: f32[R, 6] = aten.silu.default(h)
      y: f32[R, 8] = aten.linear.default(a, b2)
      return y
    }
  }
  y: f32[B, 8] = moe.combine(out, order, w) <k=K, tokens={B}, dtype=f32, weighted=true> @ mlp
"""
BY_TASK = """
  row: f32[B, 4] = aten.embedding.default(tasks, task)
  w: f32[B, K], i: i64[B, K] = moe.route(row) <k=K> @ mlp.router
"""
GATES = """
  gate: f32[B, 4, 8] = aten.index_select.default(gates, task) <dim=0>
  column: f32[B, 8, 1] = aten.reshape.default(x) <shape=({B}, 8, 1)>
  product: f32[B, 4, 1] = aten.bmm.default(gate, column)
  logits: f32[B, 4] = aten.reshape.default(product) <shape=({B}, 4)>
  w: f32[B, K], i: i64[B, K] = moe.route(logits) <k=K> @ mlp.router
"""
MASKED = """
  logits: f32[B, 4] = aten.linear.default(x, router)
  out_of: f32[B, 4] = aten.embedding.default(masks, task)
  t: f32[B, 4] = aten.add.Tensor(logits, out_of)
  w: f32[B, K], i: i64[B, K] = moe.route(t) <k=K> @ mlp.router
"""
FILLED = MASKED.replace(
    "  t: f32[B, 4] = aten.add.Tensor(logits, out_of)",
    "  no: bool[B, 4] = aten.lt.Scalar(out_of) <other=0>\n"
    "  t: f32[B, 4] = aten.masked_fill.Scalar(logits, no) <value=-inf>",
)
WHERE = FILLED.replace(
    "aten.masked_fill.Scalar(logits, no) <value=-inf>", "aten.where.self(no, infinity, logits)"
)
LIMITED = EXPERTS.replace("moe.dispatch(x, i)", "moe.dispatch(x, c)").replace(
    "  rows:", "  c: i64[B, K] = moe.capacity(i) <num_experts=4, capacity=3>\n  rows:", 1
)


def model(router: str, k: int = 2, experts: str = EXPERTS, seed: int = 0) -> Program:
    text = (router + experts).replace("K*B", f"{k}*B" if k > 1 else "B").replace("K", str(k))
    full = parse(f"""
    graph main(x: f32[B, 8], task: i64[B]; tasks: f32[3, 4], gates: f32[3, 4, 8], router: f32[4, 8],
               masks: f32[3, 4], infinity: f32[1, 4], w1: f32[4, 6, 8], w2: f32[4, 8, 6]) {{
      size B in [0, inf]{text}
      return y
    }}""")
    graph = drop_dead(full)  # the weights that this router reads
    generator = torch.Generator().manual_seed(seed)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) for p in graph.params
    }
    out = -math.inf
    fixed = {
        "masks": torch.tensor([[0.0] * 4, [0, out, 0, out], [out, out, out, 0]]),
        "infinity": torch.full((1, 4), out),
    }
    return Program(graph, {name: fixed.get(name, tensor) for name, tensor in weights.items()})


def specialised(program: Program, **inputs: Any) -> PassResult:
    return run(program, [Specialise(inputs)], stage=Stage.MOE)[-1]


def assert_same(before: Program, after: Program, task: int, rows: int = 7, seed: int = 0) -> None:
    """Products of other rows differ in rounding alone: sums of 8 and 6 numbers of about 1."""
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    (right,) = evaluate(before.graph, [x, torch.full((rows,), task)], before.weights)
    (result,) = evaluate(after.graph, [x], after.weights)
    torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5)


def test_text(golden: Any) -> None:
    golden(print_graph(specialised(model(BY_TASK), task=2).program.graph))


def test_a_router_of_the_task_alone_leaves_dense_layers() -> None:
    before = model(BY_TASK)
    step = specialised(before, task=2)
    chosen = before.weights["tasks"][2].topk(2).indices.tolist()
    assert step.says[0] == f"mlp: every token takes {chosen[0]}, {chosen[1]} of 4 experts: dense"
    assert "moe." not in print_graph(step.program.graph)
    saved = 4 * (2 * 2 * 6 * 8 + 3 * 4 - 2)  # two of four experts; the table, but for two weights
    assert step.says[1] == f"task=2: {saved} bytes of weights fewer"
    assert [v.name for v in step.program.graph.inputs] == ["x"]


@settings(max_examples=25)
@given(
    router=st.sampled_from([BY_TASK, GATES]),
    k=st.integers(1, 4),
    task=st.integers(0, 2),
    rows=st.sampled_from([0, 1, 2, 7]),
    seed=st.integers(0, 99),
)
def test_same_numbers_for_any_routing(router: str, k: int, task: int, rows: int, seed: int) -> None:
    before = model(router, k, seed=seed)
    assert_same(before, specialised(before, task=task).program, task, rows, seed)


@pytest.mark.parametrize("router", [MASKED, FILLED, WHERE], ids=["added", "filled", "where"])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_experts_behind_minus_infinity_are_dropped(router: str, rows: int) -> None:
    before = model(router)
    step = specialised(before, task=1)
    assert step.says[0] == "mlp: 0, 2 of 4 experts can be chosen"
    assert step.program.weights["w1_2"].shape == (2, 6, 8)
    assert_same(before, step.program, 1, rows)


def test_weights_on_the_input_and_another_branch() -> None:
    experts = EXPERTS.replace("dispatch(x, i)", "dispatch(x, i, w)").replace(
        "combine(out, order, w) <k=K, tokens={B}, dtype=f32, weighted=true>",
        "combine(out, order, x) <k=K, tokens={B}, dtype=f32, added=true>",
    )
    before = model(BY_TASK, 2, experts)
    step = specialised(before, task=0)
    assert "dense" in step.says[0]
    assert_same(before, step.program, 0)


def test_a_capacity_is_declined() -> None:
    before = model(BY_TASK, 1, LIMITED)
    step = specialised(before, task=1)
    assert [d.reason for d in step.declined] == [
        "every token takes the same experts, and a capacity drops some of them"
    ]
    assert_same(before, step.program, 1)


def test_fuel() -> None:
    """Without any the input is bound, and nothing else is done."""
    before = model(BY_TASK)
    step = run(before, [Specialise({"task": 1})], stage=Stage.MOE, fuel=0)[-1]
    assert step.rewrites == 0
    assert "moec.bound" not in print_graph(step.program.graph)
    assert_same(before, step.program, 1)


@pytest.mark.parametrize(
    ("router", "k", "task", "reason"),
    [
        (GATES, 2, 0, "every expert can still be chosen with the inputs that were bound"),
        (MASKED, 2, 2, "1 experts can be chosen, and each token needs 2"),
        (MASKED.replace("route(t)", "route(t, corr)").replace(
            "  t:", "  corr: f32[4] = aten.select.int(tasks) <dim=0, index=0>\n  t:"),
         2, 1, (
             "the router adds a correction to its scores, after which -inf no longer excludes an "
             "expert"
         )),
        (MASKED.replace("<k=K>", "<k=K, groups=2, top_groups=2>"), 2, 1,
         "the router chooses by groups of experts"),
        (MASKED.replace("<k=K>", '<k=K, score="sparsemixer">'), 2, 1,
         "the router chooses by sparsemixer"),
        (BY_TASK.replace("moe.route(row) <k=K>", "moe.route(row) <k=K>").replace(
            " i: i64[B, K] = moe.route", " j: i64[B, K] = moe.route").replace(
            "@ mlp.router", "@ mlp.router\n  i: i64[B, K] = aten.add.Tensor(j) <other=4>"),
         1, 1, "and there are 4"),
    ],
    ids=["nothing to drop", "too few", "corrected", "groups", "sparsemixer", "no expert"],
)  # fmt: skip
def test_declines(router: str, k: int, task: int, reason: str) -> None:
    before = model(router, k)
    step = specialised(before, task=task)
    assert [reason in d.reason for d in step.declined] == [True], step.declined
    assert "moe.experts" in print_graph(step.program.graph)
    if reason != "and there are 4":
        assert_same(before, step.program, task)


def test_rows_that_two_combines_read_are_declined() -> None:
    experts = EXPERTS.replace("  y: f32[B, 8]", "  z: f32[B, 8]") + (
        "  s: f32[B, 8] = moe.combine(out, order) <k=K, tokens={B}, dtype=f32> @ mlp\n"
        "  y: f32[B, 8] = aten.add.Tensor(z, s)\n"
    )
    before = model(BY_TASK, 2, experts)
    step = specialised(before, task=0)
    assert [d.reason for d in step.declined] == [
        "the rows of the experts are read by more than one moe.combine"
    ]
    assert_same(before, step.program, 0)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "specialise: name an input of the model and its constant value"),
        ({"language": 1}, "specialise: the model has no input language; it has x, task"),
        ({"task": 3}, "specialise: task is 3, and looks up one of 3 rows: give 0 to 2"),
        ({"task": 0.5}, "specialise: task is 0.5, and the input takes whole numbers (i64[B])"),
        ({"task": [1, 2]}, "specialise: task is given 2 numbers, and the input is i64[B]"),
        ({"task": "two"}, "specialise: task is 'two': give numbers"),
        ({"x": 1.0, "task": 0}, "specialise: x is the only input that determines the size B"),
    ],
)
def test_what_is_refused(inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        run(model(BY_TASK), [Specialise(inputs)], stage=Stage.MOE)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task=two", "here: task is 'two', expected a number, or numbers with : between them"),
        ("task", "here: write task as option=value; specialise takes INPUT=VALUE"),
        ("task=1,task=2", "here: task is given twice"),
        ("", "specialise: name an input of the model and its constant value"),
    ],
)
def test_what_is_refused_as_text(text: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_pass(Specialise, text, "here")
    assert says in str(raised.value)


def test_as_text() -> None:
    assert parse_pass(Specialise, "task=3, scale=0.5:1", "") == Specialise(
        {"task": 3, "scale": [0.5, 1]}
    )


@pytest.mark.parametrize(
    ("op", "reference"),
    [
        ("v: f32[B, 4] = aten.softmax.int(row) <dim=-1>", True),
        ("v: f32[B, 4] = aten.softmax.int(row) <dim=0>", False),
        ("v: f32[4] = aten.sum.dim_IntList(row) <dim=(0)>", False),
        ("v: f32[4, B] = aten.reshape.default(row) <shape=(4, {B})>", False),
        ("v: f32[4*B] = aten.reshape.default(row) <shape=({4*B})>", False),
        ("v: f32[1, B] = aten.slice.Tensor(one) <dim=1, end={B}>", False),
        ("v: f32[B, 4] = aten.cumsum.default(row) <dim=0>", False),
        ("v: f32[2*B, 4] = aten.cat.default(row, row) <tensors=($0, $1)>", False),
        ("v: f32[4] = aten.select.int(row) <dim=0, index=0>", False),
        ("v: f32[B, 4] = aten.rand_like.default(row)", False),
        ("v: f32[B, 4] = aten.linear.default(row, square)", True),
        ("v: f32[B, 4] = aten.mul.Tensor(row, x)", False),
    ],
)
def test_what_is_known(op: str, reference: bool) -> None:
    """An op that combines several tokens gives no constant."""
    graph = parse(f"""
    graph main(x: f32[B, 4], task: i64[B]; tasks: f32[3, 4], square: f32[4, 4]) {{
      row: f32[B, 4] = aten.embedding.default(tasks, task)
      first: f32[1, 4] = aten.slice.Tensor(square) <end=1>
      one: f32[1, 4] = aten.mul.Tensor(first, first)
      {op}
      return v
    }}""")
    weights = {p.name: torch.randn([int(d) for d in p.shape]) for p in graph.params}
    (value,) = graph.outputs
    seeds = {graph.inputs[1]: torch.tensor([1])}
    assert (value in TokenInvariantAnalysis(Program(graph, weights), seeds).constants) is reference


def test_a_value_that_the_model_fails_on() -> None:
    with pytest.raises(UsageError, match=r"gate = aten\.index_select\.default fails on what"):
        run(model(GATES), [Specialise({"task": 3})], stage=Stage.MOE)


def test_bound_values_have_a_text() -> None:
    result = bind(model(BY_TASK), {"task": 2}, "it").graph
    assert print_graph(parse(print_graph(result))) == print_graph(result)
