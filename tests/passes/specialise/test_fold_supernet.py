"""fold-supernet: mixtures of weights become the weight of the chosen architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.errors import UsageError
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.specialise.fold_supernet import FoldSupernet

ROUTER = """
  h: f32[1, 4] = aten.linear.default(arch, w1) @ fc.router.0
  r: f32[1, 4] = aten.relu.default(h) @ fc.router
"""
LAYERS = """
  l: f32[1, 2] = aten.linear.default(r, w2) @ fc.router.1
  p: f32[1, 2] = aten.softmax.int(l) <dim=-1> @ fc.router
  q: f32[2, 1, 1] = aten.reshape.default(p) <shape=(2, 1, 1)> @ fc
  cut: f32[2, 6, 8] = aten.slice.Tensor(experts) <dim=1, end=6> @ fc
  part: f32[2, 6, 8] = aten.mul.Tensor(cut, q) @ fc
  w: f32[6, 8] = aten.sum.dim_IntList(part) <dim=(0)> @ fc
  y: f32[T, 6] = aten.linear.default(x, w) @ fc
"""
NEURONS = """
  l: f32[1, 12] = aten.linear.default(r, w3) @ fc.router.1
  b: f32[2, 6, 1] = aten.reshape.default(l) <shape=(2, 6, 1)> @ fc
  cut: f32[2, 6, 8] = aten.slice.Tensor(experts) <dim=1, end=6> @ fc
  part: f32[2, 6, 8] = aten.mul.Tensor(cut, b) @ fc
  w: f32[6, 8] = aten.sum.dim_IntList(part) <dim=(0)> @ fc
  y: f32[T, 6] = aten.linear.default(x, w) @ fc
"""
STORED = "arch: f32[1, 3], w1"


def model(body: str, stored: bool = False, seed: int = 0) -> Program:
    inputs, params = ("x: f32[T, 8]", STORED) if stored else ("x: f32[T, 8], arch: f32[1, 3]", "w1")
    graph = parse(f"""
    graph main({inputs}; {params}: f32[4, 3], w2: f32[2, 4], w3: f32[12, 4],
               experts: f32[2, 9, 8]) {{
      size T in [0, inf]{body}
      return y
    }}""")
    generator = torch.Generator().manual_seed(seed)
    return Program(graph, {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) for p in graph.params
    })  # fmt: skip


def folded(program: Program, **inputs: Any) -> PassResult:
    return run(program, [FoldSupernet(inputs)])[-1]


def test_text(golden: Any) -> None:
    golden(print_graph(folded(model(ROUTER + LAYERS), arch=[0.5, 1, 0.25]).program.graph))


@given(
    body=st.sampled_from([LAYERS, NEURONS]),
    arch=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    stored=st.booleans(),
    rows=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_one_dense_layer_with_the_same_numbers(
    body: str, arch: list[float], stored: bool, rows: int, seed: int
) -> None:
    """The same ops give the weight, so that it has the same bits."""
    before = model(ROUTER + body, stored, seed)
    step = folded(before) if stored else folded(before, arch=arch)
    graph = step.program.graph
    assert [op.name for op in graph.ops] == ["aten.linear.default"]
    assert [value.name for value in graph.inputs] == ["x"]
    assert [str(p.type) for p in graph.params] == ["f32[6, 8]"]
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    inputs = [x] if stored else [x, torch.tensor([arch])]
    (right,) = evaluate(before.graph, inputs, before.weights)
    (result,) = evaluate(graph, [x], step.program.weights)
    assert torch.equal(result, right)


def test_a_mixture_by_an_input_that_is_not_bound_is_declined() -> None:
    step = folded(model(ROUTER + LAYERS))
    assert [(d.where, d.reason) for d in step.declined] == [
        ("fc", "its weight is mixed by arch: bind that input too")
    ]
    assert step.rewrites == 0


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"archs": 1.0}, "fold-supernet: the model has no input archs; it has x, arch"),
        (
            {"arch": [1.0, 2.0]},
            "fold-supernet: arch is given 2 numbers, and the input is f32[1, 3]",
        ),
    ],
)
def test_what_is_refused(inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        folded(model(ROUTER + LAYERS), **inputs)
    assert says in str(raised.value)


class Mixed(nn.Module):
    """A feed-forward layer whose two weights are mixed layer by layer, of 10 hidden ones 6 kept."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.up, self.down = (
            nn.Parameter(torch.randn(2, 10, 8)),
            nn.Parameter(torch.randn(2, 8, 10)),
        )

    def forward(self, x: Tensor, arch: Tensor) -> Tensor:
        r = self.router(arch).softmax(-1)
        up, down = (torch.einsum("i,iab->ab", r, w) for w in (self.up[:, :6], self.down[..., :6]))
        return F.linear(F.gelu(F.linear(x, up)), down)


def test_a_module() -> None:
    torch.manual_seed(0)
    model, x, arch = Mixed(), torch.randn(5, 8), torch.tensor([1.0, 0.5, 0.0])
    compiled = moec.compile(model, (x, arch), passes="+fold-supernet(arch=1:0.5:0)")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x, arch), rtol=1e-5, atol=1e-5)
    assert [op.name for op in compiled.graph.ops if "linear" in op.name] == [
        "aten.linear.default"
    ] * 2
    assert sorted(str(p.type) for p in compiled.graph.params) == ["f32[6, 8]", "f32[8, 6]"]
