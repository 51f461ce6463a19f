"""Gradients part by part are those of the whole graph at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moec.ir.interpret.evaluate import run_graph
from moec.ir.text import parse
from moec.optimise.optimisation import row_gradients
from moec.optimise.optimisation.optimize import search
from moec.optimise.optimisation.row_gradients import parts, run_forth_and_back
from tests.models.families import FAMILIES

GRAPH = """
graph main(x: f32[T, 8], w: f32[8, 8], v: f32[8, 8]) {
  size T in [0, inf]
  a: f32[T, 8] = aten.linear.default(x, w)
  s: f32[T, 8] = aten.silu.default(a)
  g: f32[T, 8] = aten.sigmoid.default(s)
  p: f32[T, 8] = aten.mul.Tensor(s, g)
  b: f32[T, 8] = aten.linear.default(p, v)
  r: f32[T, 8] = aten.add.Tensor(b, a)
  c: f32[T, 8] = aten.linear.default(r, w)
  d: f32[T, 8] = aten.add.Tensor(c, a)
  return d, b
}"""
LINEARS = ("a", "b", "c")


def score(results: Sequence[Tensor]) -> Tensor:
    d, b = results
    return (d * d).sum() + (b.sin() * 3).sum()


def test_gradients_of_values_that_several_parts_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """`a` is read by two parts, and `b` is a result, too."""
    monkeypatch.setattr(row_gradients, "PRODUCTS", 1)
    graph = parse(GRAPH)
    x, w, v = torch.randn(5, 8), torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    score(run_graph(graph, [x, w, v])).backward()
    right, again = w.grad, w.detach().clone().requires_grad_()
    results = run_forth_and_back(graph, [x, again, v], LINEARS, {}, {}, score)
    torch.testing.assert_close(again.grad, right)
    torch.testing.assert_close(results[0].detach(), run_graph(graph, [x, w, v])[0].detach())
    assert len(list(parts(graph, LINEARS))) == 3


def test_parts_end_where_little_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `a`, where nothing else is alive, and not later, with `s`, `g` or `p`."""
    monkeypatch.setattr(row_gradients, "PRODUCTS", 1)
    graph = parse(GRAPH)
    ends = [graph.ops[part[-1]].outputs[0].name for part in parts(graph, LINEARS)]
    assert ends == ["a", "b", "d"]
    assert [i for part in parts(graph, LINEARS) for i in part] == list(range(len(graph.ops)))


def test_few_products_are_one_part() -> None:
    assert list(parts(parse(GRAPH), LINEARS)) == [range(8)]


def damages(name: str) -> list[float]:
    """Of all products and formats, as predicted."""
    torch.manual_seed(0)
    family = FAMILIES[name].one_layer()
    calib = {k: v for k, v in family.inputs(4, 16, seed=3).items() if k != "use_cache"}
    formats = ("int8", "int4:32")
    searched = search(family.build(), (), family.inputs(2, 16), calib=calib, formats=formats)
    return [option.damage for product in searched.products for option in product.options[1:]]


@pytest.mark.parametrize("name", ["deepseek_v3", "switch_transformers"])
def test_damage_does_not_depend_on_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_gradients, "PRODUCTS", 1000)
    once = damages(name)
    monkeypatch.setattr(row_gradients, "PRODUCTS", 1)
    assert damages(name) == pytest.approx(once, rel=1e-2)
