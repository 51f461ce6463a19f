"""Two calls of the same experts become one block over the rows of both."""

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
from moec.passes.simplify.join_calls import JoinCalls

D, H, E = 4, 6, 3


def call(
    number: int, x: str, weights: str = "up, down", capacity: bool = False, router: str = "router"
) -> str:
    limit = f"j{number}: i64[T, 2] = moe.capacity(i{number}) <num_experts=3, capacity=2>"
    return f"""
  l{number}: f32[T, 3] = aten.linear.default({x}, {router})
  w{number}: f32[T, 2], i{number}: i64[T, 2] = moe.route(l{number}) <k=2>
  {limit if capacity else ""}
  r{number}: f32[2*T, 4], o{number}: i32[2*T], e{number}: i32[3] = \
moe.dispatch({x}, {"j" if capacity else "i"}{number}) <num_experts=3> @ layer{number}
  out{number}: f32[2*T, 4] = moe.experts(r{number}, e{number}, {weights}) @ layer{number} {{
    graph body(a: f32[R, 4]; u: f32[6, 4], d: f32[4, 6]) {{
      h{number}: f32[R, 6] = aten.linear.default(a, u)
      g{number}: f32[R, 6] = aten.relu.default(h{number})
      b{number}: f32[R, 4] = aten.linear.default(g{number}, d)
      return b{number}
    }}
  }}
  y{number}: f32[T, 4] = moe.combine(out{number}, o{number}, w{number}) \
<k=2, tokens={{T}}, dtype=f32, weighted=true> @ layer{number}
"""


def program(body: str, result: str) -> Program:
    text = f"""graph main(x: f32[T, 4], z: f32[T, 4]; router: f32[3, 4], another: f32[3, 4],
up: f32[3, 6, 4], down: f32[3, 4, 6], other: f32[3, 6, 4]) {{
  size T in [0, inf]
{body}
  return {result}
}}"""
    lines = [line for line in text.replace(",\nup", ", up").splitlines() if line.strip()]
    graph = parse("\n".join(lines) + "\n")
    chance = torch.Generator().manual_seed(0)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=chance) for p in graph.params
    }  # type: ignore[arg-type]
    return Program(graph, weights)


def after(before: Program) -> PassResult:
    return run(before, [JoinCalls()], stage=Stage.MOE)[-1]


TWO = call(1, "x") + call(2, "z") + "\n  y: f32[T, 4] = aten.add.Tensor(y1, y2)\n"


def test_text(golden: Any) -> None:
    golden(print_graph(after(program(TWO, "y")).program.graph))


@settings(max_examples=15)
@given(tokens=st.sampled_from([0, 1, 2, 7]), seed=st.integers(0, 99), copies=st.booleans())
def test_the_numbers_stay(tokens: int, seed: int, copies: bool) -> None:
    """The same products of rows and weights; eager's products of other shapes may round
    differently."""
    before = program(TWO, "y")
    chance = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(tokens, D, generator=chance) for _ in range(2))
    inputs = [x, x if copies else z]
    (right,) = evaluate(before.graph, inputs, before.weights)
    step = after(before)
    (result,) = evaluate(step.program.graph, inputs, step.program.weights)
    torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-5)
    assert [op.name for op in step.program.graph.ops].count("moe.experts") == 1


def test_routers_that_differ_stay() -> None:
    before = program(
        call(1, "x") + call(2, "z", router="another")
        + "\n  y: f32[T, 4] = aten.add.Tensor(y1, y2)\n", "y"
    )  # fmt: skip
    step = after(before)
    inputs = [torch.randn(5, D), torch.randn(5, D)]
    names = [op.name for op in step.program.graph.ops]
    assert (names.count("moe.route"), names.count("moe.experts")) == (1, 1)
    torch.testing.assert_close(
        evaluate(step.program.graph, inputs, step.program.weights),
        evaluate(before.graph, inputs, before.weights),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_comes_between_moves_behind() -> None:
    """The first call's result is used before the second call's rows are there."""
    between = (
        call(1, "x") + "\n  s: f32[T, 4] = aten.sin.default(y1)\n  c: f32[T, 4] = "
        "aten.cos.default(z)\n" + call(2, "c") + "\n  y: f32[T, 4] = aten.add.Tensor(s, y2)\n"
    )
    before = program(between, "y")
    step = after(before)
    inputs = [torch.randn(5, D), torch.randn(5, D)]
    assert step.rewrites == 1
    torch.testing.assert_close(
        evaluate(step.program.graph, inputs, step.program.weights),
        evaluate(before.graph, inputs, before.weights),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (call(1, "x") + call(2, "y1"), "its experts are applied to their own outputs"),
        (call(1, "x") + call(2, "z", "other, down"), ""),
        (call(1, "x", capacity=True) + call(2, "z", capacity=True), ""),
    ],
    ids=["one after the other", "other weights", "limits"],
)
def test_calls_that_stay(body: str, reason: str) -> None:
    step = after(program(body + "\n  y: f32[T, 4] = aten.add.Tensor(y1, y2)\n", "y"))
    assert step.rewrites == 0
    assert [declined.reason for declined in step.declined] == ([reason] if reason else [])
