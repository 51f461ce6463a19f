"""hoist-routers: which routers can be hoisted, and that the parts give the results of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.specialise.hoist_routers import HoistRouters, split

LAYER = """
  rows#: f32[B*S, 8], order#: i32[B*S], ends#: i32[4] =
    moe.dispatch(IN, CHOICE) <num_experts=4> @ layers.#
  hidden#: f32[B*S, 6] = grouped.linear(rows#, ends#, layers.#.w1) <matrices=1, dtype=f32>
    @ layers.#.experts
  out#: f32[B*S, 8] = grouped.linear(hidden#, ends#, layers.#.w2) <matrices=1, dtype=f32>
    @ layers.#.experts
  y#: f32[B*S, 8] = moe.combine(out#, order#, WEIGHT)
    <k=1, tokens={B*S}, dtype=f32, weighted=true> @ layers.#
  x#: f32[B*S, 8] = aten.add.Tensor(IN, y#)
"""
BY_IDS = """
  looked: f32[B, S, 8] = aten.embedding.default(own, ids)
  flat: f32[B*S, 8] = aten.reshape.default(looked) <shape=({B*S}, 8)>
  logits: f32[B*S, 4] = aten.linear.default(flat, router) @ router
  w: f32[B*S, 1], i: i64[B*S, 1] = moe.route(logits) <k=1> @ router
"""
HIDDEN = BY_IDS.replace("linear.default(flat", "linear.default(h")
BY_EXPERTS = """
  again: f32[B*S, 4] = aten.linear.default(x0, router) @ layers.1.router
  w1: f32[B*S, 1], i1: i64[B*S, 1] = moe.route(again) <k=1> @ layers.1.router
"""


def layer(number: int, x: str, weight: str = "w", choice: str = "i") -> str:
    result = LAYER.replace("#", str(number)).replace("IN", x)
    return result.replace("WEIGHT", weight).replace("CHOICE", choice)


def model(body: str, seed: int = 0) -> Program:
    shapes = {"embed": (9, 8), "own": (9, 8), "mix": (8, 8), "router": (4, 8)}
    for i in range(2):
        shapes |= {f"layers.{i}.w1": (4, 6, 8), f"layers.{i}.w2": (4, 8, 6)}
    params = ", ".join(f"{name}: f32{list(shape)}" for name, shape in shapes.items())
    graph = parse(f"""
    graph main(ids: i64[B, S]; {params}) {{
      size B in [0, inf]
      size S in [0, inf]
      embedded: f32[B, S, 8] = aten.embedding.default(embed, ids)
      wide: f32[B*S, 8] = aten.reshape.default(embedded) <shape=({{B*S}}, 8)>
      h: f32[B*S, 8] = aten.linear.default(wide, mix) @ attention{body}
      return x1
    }}""")
    generator = torch.Generator().manual_seed(seed)
    return Program(
        graph, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


ONE_FOR_ALL = BY_IDS + layer(0, "h") + layer(1, "x0")
FIRST_ALONE = BY_IDS + layer(0, "h") + BY_EXPERTS + layer(1, "x0", "w1", "i1")


def hoisted(program: Program, fuel: int | None = None) -> PassResult:
    return run(program, [HoistRouters()], stage=Stage.GROUPED, fuel=fuel)[-1]


def test_text(golden: Any) -> None:
    step = hoisted(model(ONE_FOR_ALL))
    parts = split(step.program)
    assert parts is not None
    graphs = (step.program.graph, parts.route.graph, parts.routed.graph)
    golden("\n".join(map(print_graph, graphs)))


def test_every_layer_is_told_of_and_the_router_runs_once() -> None:
    step = hoisted(model(ONE_FOR_ALL))
    assert step.says == (
        "layers.0: its experts depend on ids only",
        "layers.1: its experts depend on ids only",
    )
    parts = split(step.program)
    assert parts is not None
    assert [choice.layer for choice in parts.choices] == ["layers.0", "layers.1"]
    routes = [op for op in parts.route.graph.ops if op.name == "moe.route"]
    assert len(routes) == 1
    assert "moe.route" not in print_graph(parts.routed.graph)
    assert set(parts.route.weights) == {"own", "router"}
    assert not set(parts.routed.weights) & {"own", "router"}


@settings(max_examples=20)
@given(
    body=st.sampled_from([ONE_FOR_ALL, FIRST_ALONE]),
    sizes=st.sampled_from([(0, 3), (1, 1), (2, 5)]),
    seed=st.integers(0, 99),
)
def test_the_parts_give_the_whole(body: str, sizes: tuple[int, int], seed: int) -> None:
    """The same ops on the same values: not a bit differs."""
    before = model(body, seed)
    step = hoisted(before)
    parts = split(step.program)
    assert parts is not None
    ids = torch.randint(9, sizes, generator=torch.Generator().manual_seed(seed))
    right = evaluate(before.graph, [ids], before.weights)
    choices = evaluate(parts.route.graph, [ids], parts.route.weights)
    assert all(map(torch.equal, evaluate(step.program.graph, [ids], step.program.weights), right))
    result = evaluate(parts.routed.graph, [ids, *choices], parts.routed.weights)
    assert all(map(torch.equal, result, right))


def test_weights_that_rows_tell_stay() -> None:
    """Experts by token id, weighted by a gate that reads hidden states (as a hashed router may)."""
    gate = """
  gate: f32[B*S, 1] = aten.sum.dim_IntList(h) <dim=(1), keepdim=true>
"""
    before = model(BY_IDS + gate + layer(0, "h", "gate") + layer(1, "x0"))
    parts = split(hoisted(before).program)
    assert parts is not None
    assert [choice.weights and choice.weights.name for choice in parts.choices] == [None, "w"]


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        (
            HIDDEN + layer(0, "h") + layer(1, "x0"),
            ["its router reads hidden states: h = aten.linear.default @ attention"] * 2,
        ),
        (FIRST_ALONE, ["its router reads outputs of the experts of layers.0"]),
    ],
    ids=["hidden states", "experts"],
)
def test_declines(body: str, reasons: list[str]) -> None:
    step = hoisted(model(body))
    assert len(step.declined) == len(reasons)
    for declined, reason in zip(step.declined, reasons, strict=True):
        assert reason in declined.reason
    assert len(step.says) == 2 - len(reasons)


def test_choices_that_are_an_input_are_declined() -> None:
    text = print_graph(model(ONE_FOR_ALL).graph).replace("ids: i64[B, S];", "ids: i64[B, S], "
        "j: i64[B*S, 1];").replace(", i) <num_experts", ", j) <num_experts")  # fmt: skip
    program = Program(parse(text), model(ONE_FOR_ALL).weights)
    step = hoisted(program)
    assert {d.reason for d in step.declined} == {
        "its choices are an input or a weight, so it has no router"
    }


def test_fuel() -> None:
    before = model(ONE_FOR_ALL)
    step = hoisted(before, fuel=0)
    assert step.says == ()
    assert [op.name for op in step.program.graph.ops] == [op.name for op in before.graph.ops]


def test_routers_of_other_inputs_are_parts() -> None:
    """Those that read the same inputs are a program; with one such program there are no parts."""
    one = split(hoisted(model(ONE_FOR_ALL)).program)
    assert one is not None
    assert one.parts == ()
