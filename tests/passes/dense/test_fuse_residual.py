"""A residual and the norm of the sum become nn.add_norm; other ops stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.codegen.package import build
from moec.ir.graph import Graph, Module, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.dense.fuse_residual import FuseResidual
from moec.runtime.call.executor import Executor
from moec.target.cpu import host

LAYER = """\
graph main(x: bf16[T, 40], r: bf16[T, 40]; w: bf16[40], b: bf16[40]) {
  size T in [0, inf]
  scaled: bf16[T, 40] = aten.mul.Tensor(x) <other=0.22>
  total: bf16[T, 40] = aten.add.Tensor(r, scaled)
  y: bf16[T, 40] = nn.rms_norm(total, w) <epsilon=1e-06, round_first=true>
  again: bf16[T, 40] = aten.add.Tensor(y, total)
  z: bf16[T, 40] = aten.layer_norm.default(again, w, b) <normalized_shape=(40), eps=1e-05>
  return total, z
}
"""
SCALED = "  scaled: bf16[T, 40] = aten.mul.Tensor(x) <other=0.22>\n"
SUM = "aten.add.Tensor(r, scaled)"


def fused(graph: Graph) -> PassResult:
    return run(Program(graph, {}), [FuseResidual()])[-1]


def names(graph: Graph) -> list[str]:
    return [op.name for op in graph.ops]


def test_golden(golden: Callable[[str], None]) -> None:
    golden(print_graph(fused(parse(LAYER)).program.graph))


@given(tokens=st.integers(0, 5), seed=st.integers(0, 100), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_means_the_same(tokens: int, seed: int, size: float) -> None:
    before = parse(LAYER)
    after = fused(before).program.graph
    assert names(after) == ["nn.add_norm", "nn.add_norm"]
    torch.manual_seed(seed)
    x, r = ((torch.randn(tokens, 40) * size).bfloat16() for _ in range(2))
    weights = {"w": torch.randn(40).bfloat16(), "b": torch.randn(40).bfloat16()}
    for actual, want in zip(*(evaluate(g, [x, r], weights) for g in (after, before)), strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_kernel_gives_the_bits_of_two(dtype: str) -> None:
    """The compiled graphs, not their meanings: one kernel a norm, where there were five."""
    before = parse(LAYER.replace("bf16", dtype))
    weights = {"w": torch.randn(40), "b": torch.randn(40)}
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights = {name: weight.to(torch_dtype) for name, weight in weights.items()}
    inputs = {name: torch.randn(33, 40).to(torch_dtype) for name in "xr"}
    inputs["x"][7, 3] = torch.nan
    packages = [
        build(Module.of(Program(graph, weights)), host())
        for graph in (before, fused(before).program.graph)
    ]
    assert [kernel for _, kernel in packages[1].kernels] == ["add_rms_norm", "add_layer_norm"]
    want, actual = (Executor(package)(inputs) for package in packages)
    for one, other in zip(want.values(), actual.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_scale_that_others_read_too_is_kept() -> None:
    graph = fused(parse(LAYER.replace("return total", "return scaled"))).program.graph
    assert names(graph) == ["aten.mul.Tensor", "nn.add_norm", "nn.add_norm"]


def test_the_other_norm_of_one_sum_stays() -> None:
    """Two norms read the sum: one of them takes it, the other reads what that gives."""
    other = "nn.rms_norm(total) <epsilon=1e-05>"
    again = LAYER.replace("aten.add.Tensor(y, total)", other)
    graph = fused(parse(again)).program.graph
    assert names(graph)[:2] == ["nn.add_norm", "nn.rms_norm"]
    assert graph.ops[1].inputs == graph.ops[0].outputs[:1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({SUM: "aten.add.Tensor(r, scaled) <alpha=2>"}, "scaled is added 2 times, and not once"),
        (
            {"r: bf16[T, 40]": "r: bf16[1, 40]"},
            "r is bf16[1, 40], and the sum that is normalised total: bf16[T, 40]",
        ),
        (
            {"r: bf16[T, 40]": "r: f32[T, 40]", "total: bf16": "total: f32", "y: bf16": "y: f32"},
            "scaled is bf16[T, 40], and the sum that is normalised total: f32[T, 40]",
        ),
        (
            {SCALED: SCALED + "  v: bf16[40] = aten.neg.default(w)\n", "(total, w)": "(total, v)"},
            "the norm's weight v is computed, and not a parameter",
        ),
        ({"bf16": "f64"}, "norms of f64[T, 40] have no kernel with an addition"),
        (
            {"again, w, b) <normalized_shape=(40)": "again) <normalized_shape=({T}, 40)"},
            "the norm is over the axes (T, 40), and not the last one",
        ),
        (
            {"(again, w, b) <": "(again, b) <bias=$1, "},
            "the norm has a bias and no weight",
        ),
    ],
)
def test_declines(changes: dict[str, str], reason: str) -> None:
    text = LAYER
    for old, new in changes.items():
        text = text.replace(old, new)
    assert text != LAYER
    assert reason in [declined.reason for declined in fused(parse(text)).declined]
