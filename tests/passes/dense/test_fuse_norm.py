"""Norms in common forms become nn.rms_norm; other ops stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.dense.fuse_norm import FuseNorm

NORM = """\
graph main(x: {x}[T, 8]; w: {w}[8]) {{
  size T in [0, inf]
  {first}
  square: f32[T, 8] = aten.pow.Tensor_Scalar({full}) <exponent=2>
  mean: f32[T, 1] = aten.mean.dim(square) <dim=(-1), keepdim=true>
  shifted: f32[T, 1] = aten.add.Tensor(mean) <other=1e-06>
  root: f32[T, 1] = aten.rsqrt.default(shifted)
  normal: f32[T, 8] = aten.mul.Tensor({times}, root)
  {last}
  return y
}}
"""
CAST = "full: f32[T, 8] = aten._to_copy.default(x) <dtype=f32>"
FORMS: dict[str, dict[str, str]] = {
    "float32": {
        "x": "f32",
        "w": "f32",
        "full": "x",
        "times": "x",
        "last": "y: f32[T, 8] = aten.mul.Tensor(w, normal)",
    },
    "weight_after_the_cast": {
        "last": "half: bf16[T, 8] = aten._to_copy.default(normal) <dtype=bf16>\n"
        "  y: bf16[T, 8] = aten.mul.Tensor(w, half)",
    },
    "weight_before_the_cast": {
        "last": "big: f32[T, 8] = aten.mul.Tensor(normal, w)\n"
        "  y: bf16[T, 8] = aten._to_copy.default(big) <dtype=bf16>",
    },
    "one_plus_weight": {
        "w": "f32",
        "last": "one: f32[8] = aten.add.Tensor(w) <other=1.0>\n"
        "  big: f32[T, 8] = aten.mul.Tensor(normal, one)\n"
        "  y: bf16[T, 8] = aten._to_copy.default(big) <dtype=bf16>",
    },
    "no_weight": {"last": "y: bf16[T, 8] = aten._to_copy.default(normal) <dtype=bf16>"},
    "the_half_itself_multiplied": {
        "times": "x",
        "last": "half: bf16[T, 8] = aten._to_copy.default(normal) <dtype=bf16>\n"
        "  y: bf16[T, 8] = aten.mul.Tensor(w, half)",
    },
}


def text(**changes: str) -> str:
    parts = {"x": "bf16", "w": "bf16", "full": "full", "times": "full"} | changes
    parts["first"] = parts.get("first", CAST if parts["full"] == "full" else "")
    return NORM.format(**parts)


def fused(graph: Graph) -> PassResult:
    return run(Program(graph, {}), [FuseNorm()])[-1]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


@pytest.mark.parametrize("form", FORMS)
def test_golden(form: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(fused(parse(text(**FORMS[form]))).program.graph))


@pytest.mark.parametrize("form", FORMS)
@given(tokens=st.integers(0, 5), seed=st.integers(0, 100), size=st.sampled_from([1e-4, 1.0, 1e4]))
def test_same_numbers(form: str, tokens: int, seed: int, size: float) -> None:
    """Bit for bit: the op's meaning is the chain that it replaces."""
    before = parse(text(**FORMS[form]))
    after = fused(before).program.graph
    assert "nn.rms_norm" in names(after)
    assert "aten.rsqrt.default" not in names(after)
    torch.manual_seed(seed)
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}
    x = (torch.randn(tokens, 8) * size).to(dtypes[before.inputs[0].dtype])
    weights = {"w": torch.randn(8).to(dtypes[before.params[0].dtype])}
    assert torch.equal(evaluate(after, [x], weights)[0], evaluate(before, [x], weights)[0])


def test_other_readers_keep_what_they_read() -> None:
    graph = parse(text(**FORMS["float32"]).replace("return y", "return y, root"))
    after = fused(graph).program.graph
    assert {"nn.rms_norm", "aten.rsqrt.default"} <= set(names(after))


def test_of_products_and_quotients() -> None:
    graph = text(**FORMS["float32"])
    graph = graph.replace("aten.pow.Tensor_Scalar(x) <exponent=2>", "aten.mul.Tensor(x, x)")
    graph = graph.replace("rsqrt", "sqrt").replace(
        "normal: f32[T, 8] = aten.mul.Tensor", "normal: f32[T, 8] = aten.div.Tensor"
    )
    before = parse(graph)
    after = fused(before).program.graph
    assert names(after) == ["nn.rms_norm"]
    x, weights = torch.randn(3, 8), {"w": torch.randn(8)}
    # x / sqrt(m) and x * (1 / sqrt(m)): one rounding more.
    torch.testing.assert_close(evaluate(after, [x], weights), evaluate(before, [x], weights))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ("<dim=(-1), keepdim=true>", "<dim=(-2), keepdim=true>"),
            "the mean of squares is over axes (-2,), not the last one",
        ),
        (
            ("aten.mul.Tensor(x, root)", "aten.mul.Tensor(square, root)"),
            "square is multiplied, but the mean is of the squares of x",
        ),
        (("f32[", "bf16["), "computed in bf16; nn.rms_norm computes in f32"),
    ],
)
def test_declined(change: tuple[str, str], reason: str) -> None:
    graph = text(**FORMS["float32"]).replace(*change)
    if "-2" in change[1]:
        graph = graph.replace("[T, 1]", "[1, 8]")
    step = fused(parse(graph))
    assert [d.reason for d in step.declined] == [reason]
    assert "nn.rms_norm" not in names(step.program.graph)


@pytest.mark.parametrize(
    "change",
    [
        ("<exponent=2>", "<exponent=3>"),  # not a square
        ("aten.mean.dim", "aten.sum.dim_IntList"),  # not a mean
        ("<other=1e-06>", "<other=1e-06, alpha=2>"),
    ],
)
def test_not_a_norm(change: tuple[str, str]) -> None:
    step = fused(parse(text(**FORMS["float32"]).replace(*change)))
    assert "nn.rms_norm" not in names(step.program.graph)


def test_weight_of_another_shape_stays_outside() -> None:
    graph = text(**FORMS["float32"]).replace("w: f32[8]", "w: f32[1, 8]")
    assert names(fused(parse(graph)).program.graph) == ["nn.rms_norm", "aten.mul.Tensor"]
