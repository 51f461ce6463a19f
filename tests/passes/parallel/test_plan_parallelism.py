"""plan-parallelism: the ranks together compute the results of the model, in every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import IRError, UnsupportedError, UsageError
from moec.ir.graph import Graph, Module, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.ranks import evaluate_ranks
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import Log
from moec.passes.parallel.plan_parallelism import parallelise, rank_programs
from moec.plan.groups import groups_of
from moec.plan.inputs.workload import Workload
from moec.plan.network.exchange import Form
from moec.plan.placement.placement import place
from moec.plan.plan import LayerPlan, Plan

E, D, H, K = 8, 6, 12, 2


def layer(k: int, width: int) -> Graph:
    return parse(f"""
graph main(x: f32[T, {width}]; router: f32[{E}, {width}], w1: f32[{E}, {H}, {width}],
           w3: f32[{E}, {H}, {width}], w2: f32[{E}, {width}, {H}], b2: f32[{E}, {width}]) {{
  size T in [0, inf]
  logits: f32[T, {E}] = aten.linear.default(x, router)
  w: f32[T, {k}], i: i64[T, {k}] = moe.route(logits) <k={k}>
  rows: f32[{k}*T, {width}], order: i32[{k}*T], ends: i32[{E}] =
    moe.dispatch(x, i) <num_experts={E}> @ mlp
  out: f32[{k}*T, {width}] = moe.experts(rows, ends, w1, w3, w2, b2) @ mlp.experts {{
    graph expert(r: f32[N, {width}]; v1: f32[{H}, {width}], v3: f32[{H}, {width}],
                 v2: f32[{width}, {H}], c2: f32[{width}]) {{
      a: f32[N, {H}] = aten.linear.default(r, v1)
      g: f32[N, {H}] = aten.silu.default(a)
      u: f32[N, {H}] = aten.linear.default(r, v3)
      h: f32[N, {H}] = aten.mul.Tensor(g, u)
      y: f32[N, {width}] = aten.linear.default(h, v2, c2)
      return y
    }}
  }}
  z: f32[T, {width}] =
    moe.combine(out, order, w) <k={k}, tokens={{T}}, dtype=f32, weighted=true> @ mlp
  return z
}}""")


MODEL = layer(K, D)


def model(seed: int = 0, graph: Graph = MODEL) -> Program:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 3
        for p in graph.params
    }
    return Program(graph, weights)


def plan(
    ranks: int, slices: int = 1, copies: int = 1, form: Form = "flat", node: int = 2, spare: int = 0
) -> Plan:
    loads = np.random.default_rng(ranks + spare).lognormal(0, 1, E)
    entry = LayerPlan(
        layer=0,
        experts=E,
        attention=1,
        ranks=ranks,
        slices=slices,
        copies=copies,
        form=form,
        slots=place(loads, ranks, max(E, ranks) + spare).slots,
        seconds={},
    )
    return Plan(
        model="test",
        cluster="test",
        devices=ranks * slices * copies,
        node_size=node,
        workload=Workload(tokens=1, sequences=0, context=0),
        routing="",
        layers=(entry,),
        seconds=0.0,
        memory=0.0,
        memory_limit=0.0,
    )


FORMS = {
    "flat": plan(4),
    "copies of experts": plan(4, spare=3),
    "more ranks than experts": plan(16, node=4),
    "data copies": plan(2, copies=2),
    "slices": plan(2, slices=2, form="coordinated"),
    "slices alone": plan(1, slices=4, form="coordinated", node=4),
    "hierarchical": plan(4, form="hierarchical"),
    "rail": plan(4, form="rail", spare=2),
    "rail over 4 nodes": plan(8, form="rail", spare=1),
    "deduplicated": plan(4, form="deduplicated", spare=2),
    "deduplicated over 4 nodes": plan(8, form="deduplicated", spare=1),
    "deduplicated and slices": plan(4, slices=2, form="deduplicated", node=4),
    "rail and slices": plan(4, slices=2, form="rail", node=4),
}


def run_both(p: Plan, counts: list[int], seed: int = 0, x: torch.Tensor | None = None) -> None:
    program = model(seed)
    if x is None:
        x = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(seed + 1))
    expected = evaluate(program.graph, [x], program.weights)[0]
    module = rank_programs(program, p)
    parts = [[part] for part in x.split(counts)]
    results = evaluate_ranks(module, parts, groups_of(p))
    # Products over other numbers of rows, and of slices, are rounded apart: H terms of size 1.
    torch.testing.assert_close(
        torch.cat([r[0] for r in results]), expected, rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("form", FORMS)
def test_ranks_together_are_the_model(form: str) -> None:
    p = FORMS[form]
    run_both(p, [(5 * rank + 3) % 7 for rank in range(p.devices)])


@pytest.mark.parametrize("form", FORMS)
def test_text(form: str, golden: Callable[[str], None]) -> None:
    program = parallelise(model(), FORMS[form], 1, Log())
    verify(program.graph, Stage.MOE)
    text = print_graph(program.graph)
    assert print_graph(parse(text)) == text
    golden(text)


@settings(max_examples=25)
@given(st.sampled_from(sorted(FORMS)), st.data())
def test_any_numbers_of_tokens(form: str, data: st.DataObject) -> None:
    p = FORMS[form]
    sizes = st.lists(st.integers(0, 5), min_size=p.devices, max_size=p.devices)
    run_both(p, data.draw(sizes), data.draw(st.integers(0, 99)))


def chosen(ids: torch.Tensor) -> tuple[Program, list[torch.Tensor]]:
    """The model with choices from outside, and its inputs; id E is no expert."""
    text = print_graph(MODEL)
    start, stop = text.index("  logits:"), text.index("  rows:")
    text = text[:start] + text[stop:]
    text = text.replace(f"x: f32[T, {D}];", f"x: f32[T, {D}], w: f32[T, {K}], i: i64[T, {K}];", 1)
    text = text.replace(f" router: f32[{E}, {D}],", "", 1)
    program = Program(parse(text), model().weights)
    tokens = len(ids)
    return program, [torch.randn(tokens, D), torch.rand(tokens, K), ids]


@settings(max_examples=25)
@given(st.sampled_from(sorted(FORMS)), st.data())
def test_any_choices(form: str, data: st.DataObject) -> None:
    """All on one expert, empty experts, choices of no expert."""
    p = FORMS[form]
    counts = data.draw(st.lists(st.integers(0, 4), min_size=p.devices, max_size=p.devices))
    size = sum(counts) * K
    ids = data.draw(st.lists(st.integers(0, E), min_size=size, max_size=size))
    program, inputs = chosen(torch.tensor(ids, dtype=torch.int64).reshape(-1, K))
    expected = evaluate(program.graph, inputs, program.weights)[0]
    parts = list(zip(*(tensor.split(counts) for tensor in inputs), strict=True))
    results = evaluate_ranks(rank_programs(program, p), parts, groups_of(p))
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["ties", "nan"])
def test_ties_and_nan(value: float) -> None:
    run_both(FORMS["rail"], [3, 0, 2, 1], x=torch.full((6, D), value))


def test_no_tokens_at_all() -> None:
    run_both(FORMS["hierarchical"], [0, 0, 0, 0])


def test_a_rank_holds_its_experts_alone() -> None:
    p = FORMS["copies of experts"]
    program = model()
    for rank in range(4):
        part = parallelise(program, p, rank, Log())
        stacks = [t for n, t in part.weights.items() if n.startswith("w2")]
        assert [len(t) for t in stacks] == [len(p.layers[0].slots[rank])]
        torch.testing.assert_close(stacks[0], program.weights["w2"][list(p.layers[0].slots[rank])])


def test_counts_that_disagree_are_an_error() -> None:
    text = """
    graph main(x: f32[R, 2], send: i32[2], receive: i32[2]) {
      y: f32[4, 2] = dist.all_to_all(x, send, receive) <group="ep", rows=4>
      return y
    }"""
    program = Program(parse(text), {})
    module = Module({"rank.0.main": program, "rank.1.main": program})
    counts = torch.tensor([2, 2], dtype=torch.int32)
    wrong = torch.tensor([2, 1], dtype=torch.int32)
    x = torch.ones(4, 2)
    with pytest.raises(IRError, match="expects 1 rows from rank 1 in group ep, 2 were sent"):
        evaluate_ranks(module, [[x, counts, wrong], [x, counts, counts]], {"ep": [(0, 1)]})


def test_one_rank_by_itself_cannot_be_evaluated() -> None:
    program = parallelise(model(), FORMS["flat"], 0, Log())
    with pytest.raises(IRError, match=r"group ep\.4x1"):
        evaluate(program.graph, [torch.ones(3, D)], program.weights)


def scaled() -> Program:
    """The model with weights applied before the experts (Llama 4), and a shared expert's output."""
    text = print_graph(MODEL).replace("moe.dispatch(x, i)", "moe.dispatch(x, i, w)")
    text = text.replace("(out, order, w) <", "(out, order, x) <").replace(
        "weighted=true", "added=true"
    )
    return Program(parse(text), model().weights)


def test_weights_before_the_experts_and_an_addend() -> None:
    p, program = FORMS["deduplicated"], scaled()
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    (expected,) = evaluate(program.graph, [x], program.weights)
    parts = [[part] for part in x.split([3, 0, 2, 2])]
    results = evaluate_ranks(rank_programs(program, p), parts, groups_of(p))
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        ("out", "a deduplicated exchange needs a moe.combine that alone reads the experts"),
        ("rows", "rows, whose rows are deduplicated, is also read by an output of the model"),
    ],
)
def test_rows_that_cannot_be_deduplicated(read: str, reason: str) -> None:
    text, log = print_graph(MODEL).replace("return z", f"return z, {read}"), Log()
    program = parallelise(Program(parse(text), model().weights), FORMS["deduplicated"], 0, log)
    assert [d.reason for d in log.declined] == [reason]
    assert not any(op.name.startswith("dist.") for op in program.graph.ops)


def test_a_plan_of_another_model() -> None:
    p = FORMS["flat"]
    other = replace(MODEL, ops=MODEL.ops[:2], outputs=())
    with pytest.raises(UsageError, match=r"plan of test is for 1 MoE layers with \[8\]"):
        parallelise(Program(other, model().weights), p, 0, Log())


def limited(order: str = "slot", capacity: str = "ceiling(T/3)") -> Program:
    """The model with a capacity for each expert."""
    limit = f'num_experts={E}, capacity={{{capacity}}}, order="{order}"'
    text = print_graph(MODEL).replace("moe.dispatch(x, i)", "moe.dispatch(x, c)")
    rows = f"  rows: f32[{K}*T"
    text = text.replace(rows, f"  c: i64[T, {K}] = moe.capacity(i) <{limit}> @ mlp\n{rows}", 1)
    return Program(parse(text), model().weights)


WITH_CAPACITY = {
    "flat": FORMS["flat"],
    "rail": FORMS["rail"],
    "deduplicated": FORMS["deduplicated"],
    "whole": plan(1, copies=4),
}


@settings(max_examples=20)
@given(st.sampled_from(sorted(WITH_CAPACITY)), st.sampled_from(["slot", "token"]), st.data())
def test_a_capacity_of_all_ranks(form: str, order: str, data: st.DataObject) -> None:
    """Choices are dropped as one process drops them, also where a layer is whole on each rank."""
    p, program = WITH_CAPACITY[form], limited(order)
    counts = data.draw(st.lists(st.integers(0, 5), min_size=4, max_size=4))
    x = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(1))
    (expected,) = evaluate(program.graph, [x], program.weights)
    parts = [[part] for part in x.split(counts)]
    results = evaluate_ranks(rank_programs(program, p), parts, groups_of(p))
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, rtol=1e-5, atol=1e-5)


def test_text_with_capacity(golden: Callable[[str], None]) -> None:
    program = parallelise(limited(), FORMS["flat"], 1, Log())
    verify(program.graph, Stage.MOE)
    golden(print_graph(program.graph))


def test_a_capacity_of_something_else() -> None:
    text = print_graph(limited(capacity="ceiling(T/3)").graph)
    text = text.replace("ceiling(T/3)", "ceiling(S/3)").replace("(x: f32", "(s: f32[S], x: f32", 1)
    text = text.replace("  size T in [0, inf]\n", "  size T in [0, inf]\n  size S in [0, inf]\n", 1)
    message = (
        r"mlp: its capacity ceiling\(S/3\) depends on S, not on the number of tokens T alone; it "
        "cannot be counted over several ranks"
    )
    with pytest.raises(UnsupportedError, match=message):
        parallelise(Program(parse(text), model().weights), FORMS["flat"], 0, Log())
