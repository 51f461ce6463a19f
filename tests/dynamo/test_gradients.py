"""Gradients over sorted rows equal those of the ops' reference, for any body and routing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.dynamo.training.gradients import IN_PYTORCH, differentiable
from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.evaluate import run_graph
from moec.ir.text import parse
from moec.passes.core.runner import run
from moec.pipeline import TRAIN

E, K = 4, 2
NARROW, WIDE = (6, 5), (64, 32)  # D, H; pairs of bf16 fill whole vectors where it is wide
# params of one expert by name, and the ops between its rows x and y
BODIES: dict[str, tuple[str, str]] = {
    "swiglu": (
        "a[2H,D] b[D,H]",
        "h[2H] = aten.linear.default(x, a)\n"
        "g[H], u[H] = aten.split_with_sizes.default(h) <split_sizes=(H, H), dim=-1>\n"
        "s[H] = aten.silu.default(g)\n"
        "p[H] = aten.mul.Tensor(s, u)\n"
        "y[D] = aten.linear.default(p, b)",
    ),
    "gelu with biases": (
        "a[H,D] c[H] b[D,H] d[D]",
        "h[H] = aten.linear.default(x, a, c)\n"
        "g[H] = aten.gelu.default(h)\n"
        "y[D] = aten.linear.default(g, b, d)",
    ),
    "tanh gelu": (
        "a[H,D] b[D,H]",
        "h[H] = aten.linear.default(x, a)\n"
        'g[H] = aten.gelu.default(h) <approximate="tanh">\n'
        "y[D] = aten.linear.default(g, b)",
    ),
    "clamped, transposed": (  # gpt_oss
        "a[D,2H] c[2H] b[H,D] d[D]",
        "w[2H,D] = aten.permute.default(a) <dims=(1, 0)>\n"
        "h[2H] = aten.linear.default(x, w, c)\n"
        "g[H] = aten.slice.Tensor(h) <dim=-1, start=0, end=9223372036854775807, step=2>\n"
        "u[H] = aten.slice.Tensor(h) <dim=-1, start=1, end=9223372036854775807, step=2>\n"
        "gc[H] = aten.clamp.default(g) <max=0.7>\n"
        "uc[H] = aten.clamp.default(u) <min=-0.7, max=0.7>\n"
        "z[H] = aten.mul.Tensor(gc) <other=1.702>\n"
        "s[H] = aten.sigmoid.default(z)\n"
        "gs[H] = aten.mul.Tensor(gc, s)\n"
        "up[H] = aten.add.Tensor(uc) <other=1>\n"
        "p[H] = aten.mul.Tensor(up, gs)\n"
        "v[D,H] = aten.permute.default(b) <dims=(1, 0)>\n"
        "y[D] = aten.linear.default(p, v, d)",
    ),
}


def lengths(sizes: tuple[int, int]) -> dict[str, int]:
    return {"D": sizes[0], "H": sizes[1], "2H": 2 * sizes[1]}


def typed(text: str, rows: str, sizes: tuple[int, int], dtype: str) -> str:
    name, _, shape = text.strip().rstrip("]").partition("[")
    dims = [str(lengths(sizes)[d]) for d in shape.split(",")]
    return f"{name}: {dtype}[{', '.join([rows, *dims] if rows else dims)}]"


@cache
def graphs(
    name: str, weighted: bool, sizes: tuple[int, int] = NARROW, dtype: str = "f32"
) -> tuple[Graph, Graph]:
    """A block of given choices, as recognised and with its bodies over all rows."""
    params, ops = BODIES[name]
    stacks = ", ".join(typed(p, str(E), sizes, dtype) for p in params.split())
    lines = []
    for line in ops.replace("H, H", f"{sizes[1]}, {sizes[1]}").splitlines():
        result, _, call = line.partition(" = ")
        # x's own sizes are free; those of weights, two of them, are not
        parts = result.replace("],", "];").split(";")
        weight = "," in parts[0]
        rows = "" if weight else "R"
        lines.append(", ".join(typed(p, rows, sizes, dtype) for p in parts) + " = " + call)
    body = "\n      ".join(lines)
    of_one = ", ".join(typed(p, "", sizes, dtype) for p in params.split())
    names = ", ".join(p.partition("[")[0] for p in params.split())
    inputs = f"weights: {dtype}[T, 2], " if weighted else ""
    d = sizes[0]
    graph = parse(
        f"""graph main({inputs}rows_in: {dtype}[T, {d}], experts: i64[T, 2]; {stacks}) {{
  size T in [0, inf]
  rows: {dtype}[2*T, {d}], order: i32[2*T], ends: i32[4] = moe.dispatch(rows_in, experts) """
        f"""<num_experts=4>
  out: {dtype}[2*T, {d}] = moe.experts(rows, ends, {names}) {{
    graph main(x: {dtype}[R, {d}]; {of_one}) {{
      {body}
      return y
    }}
  }}
  z: {dtype}[T, {d}] = moe.combine(out, order{", weights" if weighted else ""}) """
        f"""<k=2, tokens={{T}}, dtype={dtype}{", weighted=true" if weighted else ""}>
  return z
}}
"""
    )
    expanded = run(Program(graph, {}), TRAIN.passes, stage=Stage.MOE)[-1].program.graph
    assert expanded.ops[-1].name == "grouped.combine"
    return graph, expanded


def tensors(
    name: str, weighted: bool, experts: torch.Tensor, sizes: tuple[int, int] = NARROW
) -> list[torch.Tensor]:
    params = [p.rstrip("]").partition("[")[2].split(",") for p in BODIES[name][0].split()]
    tokens = len(experts)
    inputs = [torch.randn(tokens, K)] if weighted else []
    stacks = [torch.randn(E, *(lengths(sizes)[d] for d in dims)) for dims in params]
    return [*inputs, torch.randn(tokens, sizes[0]), experts, *stacks]


def gradients(graph: Graph, inputs: list[torch.Tensor], grad: torch.Tensor, **how: object) -> list:
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    (y,) = run_graph(graph, leaves, **how)  # type: ignore[arg-type]
    floats = [leaf for leaf in leaves if leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, floats, grad, materialize_grads=True)]


def check(name: str, weighted: bool, experts: torch.Tensor) -> None:
    graph, expanded = graphs(name, weighted)
    inputs = tensors(name, weighted, experts)
    grad = torch.randn(len(experts), NARROW[0])
    expected = gradients(graph, inputs, grad)
    results = gradients(expanded, inputs, grad, meanings=differentiable(IN_PYTORCH))
    for actual, theirs in zip(results, expected, strict=True):
        # float32 sums of some dozen products in another order: what is lost is a share of the
        # terms, which are no greater than the greatest sums, and not of a sum near zero.
        greatest = theirs.abs().amax() if theirs.numel() else 0.0
        torch.testing.assert_close(actual, theirs, rtol=0, atol=1e-5 * max(1.0, float(greatest)))


def error(gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Of each, relative to its norm."""
    pairs = zip(gradients, expected, strict=True)
    return [float((m.float() - w).norm() / w.norm().clamp(min=1e-6)) for m, w in pairs]


@pytest.mark.parametrize("name", ["swiglu", "clamped, transposed"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_bf16_is_as_near_to_float32_as_eager(name: str, tokens: int) -> None:
    """Rows, products and gradients are rounded to bf16 as often as in eager's loop, and summed in
    float32. Over some hundred elements the norms of such errors agree within a tenth or so; those
    of a gradient of few elements (one token) within a factor."""
    experts = torch.randint(0, E, (tokens, K))
    inputs = [
        t.bfloat16() if t.is_floating_point() else t for t in tensors(name, True, experts, WIDE)
    ]
    for t in inputs:
        if t.is_floating_point() and t.dim() == 3:
            t *= 0.1
    grad = torch.randn(tokens, WIDE[0]).bfloat16()
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    expected = gradients(graphs(name, True, WIDE)[0], wide, grad.float())
    graph, expanded = graphs(name, True, WIDE, "bf16")
    eager = error(gradients(graph, inputs, grad), expected)
    actual = error(gradients(expanded, inputs, grad, meanings=differentiable(IN_PYTORCH)), expected)
    slack = 1.2 if tokens > 1 else 2
    assert all(m <= slack * e + 1e-3 for m, e in zip(actual, eager, strict=True)), (actual, eager)


@settings(max_examples=60)
@given(
    data=st.data(),
    name=st.sampled_from(list(BODIES)),
    weighted=st.booleans(),
    tokens=st.integers(0, 12),
)
def test_any_routing(data: st.DataObject, name: str, weighted: bool, tokens: int) -> None:
    """Experts without tokens, all tokens on one, an expert chosen twice, and ids of no expert
    (4)."""
    ids = data.draw(st.sampled_from([st.integers(0, 4), st.integers(0, 3), st.just(2), st.just(4)]))
    flat = data.draw(st.lists(ids, min_size=K * tokens, max_size=K * tokens))
    check(name, weighted, torch.tensor(flat, dtype=torch.int64).reshape(tokens, K))


@pytest.mark.parametrize("name", BODIES)
def test_they_are_the_same_each_time(name: str) -> None:
    _, expanded = graphs(name, True)
    inputs = tensors(name, True, torch.randint(0, E, (40, K)))
    grad = torch.randn(40, NARROW[0])
    meanings = differentiable(IN_PYTORCH)
    first, second = (gradients(expanded, inputs, grad, meanings=meanings) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_the_gradient_of_a_transposed_stack_lies_as_the_stack_does() -> None:
    name = "clamped, transposed"
    _, expanded = graphs(name, True)
    inputs = tensors(name, True, torch.randint(0, E, (7, K)))
    meanings = differentiable(IN_PYTORCH)
    actual = gradients(expanded, inputs, torch.randn(7, NARROW[0]), meanings=meanings)
    assert all(gradient.is_contiguous() for gradient in actual)


def test_the_meaning_itself_writes_the_gradient_of_a_stack_once() -> None:
    """And not once for each expert, as the gradient of `stack[expert]` would be."""
    graph, _ = graphs("tanh gelu", True)
    inputs = tensors("tanh gelu", True, torch.randint(0, E, (3, K)))
    with torch.profiler.profile() as profile:
        gradients(graph, inputs, torch.randn(3, NARROW[0]))
    assert "UnbindBackward0" in {event.key for event in profile.key_averages()}
