"""Indices that eager refuses are refused: by kernels for CPUs, by the interpreter, and before the
call where they are inputs. Ones that cannot be outside of their axis are not checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.codegen.backends.cpu.backend import CPU
from moec.codegen.lower import with_index_checks
from moec.codegen.package import build
from moec.errors import InputError
from moec.ir.graph import Module, Program
from moec.ir.index_uses import REQUIRE
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.runtime.call.executor import Executor
from moec.target.cpu import host

Function = Callable[..., Any]


class Uses(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.embedding = nn.Embedding(4, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
        return self.function(self, x, ids)


def computed(ids: torch.Tensor) -> torch.Tensor:
    """Indices that are no input, and may be anything."""
    return ids * 2 - 2


def one_hot(m: Any, x: torch.Tensor, ids: torch.Tensor) -> Any:
    return nn.functional.one_hot(ids, 4) * x[:, :1]


FUNCTIONS: dict[str, Function] = {
    "embedding": lambda m, x, i: m.embedding(i),
    "gather": lambda m, x, i: x.gather(1, i[:, None]),
    "index": lambda m, x, i: x[:, i],
    "index_select": lambda m, x, i: x.index_select(1, i),
    "take_along_dim": lambda m, x, i: torch.take_along_dim(x, i[:, None], 1),
    "take": lambda m, x, i: x[0].take(i),
    "one_hot": one_hot,
    "index_put": lambda m, x, i: x.t().clone().index_put((i,), x[:, 0]),
    "index_add": lambda m, x, i: torch.zeros(4, 4).index_add(0, i, x),
    "index_copy": lambda m, x, i: torch.zeros(4, 4).index_copy(0, i, x),
    "index_fill": lambda m, x, i: x.index_fill(1, i, 1.0),
    "scatter": lambda m, x, i: x.scatter(1, i[:, None], 1.0),
    "scatter_src": lambda m, x, i: x.scatter(1, i[:, None], x * 2),
    "scatter_add": lambda m, x, i: x.scatter_add(1, i[:, None], x),
    "scatter_reduce": lambda m, x, i: x.scatter_reduce(1, i[:, None], x, "amax"),
}


def outcome(function: Function, *arguments: Any) -> Any:
    """The result; None where the arguments are refused."""
    try:
        return function(*arguments)
    except (RuntimeError, IndexError, InputError):
        return None


@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "computed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_eager(name: str, inputs: bool) -> None:
    function = FUNCTIONS[name]
    module = Uses(function if inputs else lambda m, x, i: function(m, x, computed(i))).eval()
    x = torch.arange(16.0).view(4, 4) + 1
    right = torch.tensor([1, 2, 1, 2])
    model = moec.compile(module, (x, right), allow_fixed=True)
    refused = 0
    for number in (0, 1, 2, 3, 4, -1, -4, -5, 2**40):
        ids = right.clone()
        ids[1] = number
        with torch.no_grad():
            expected = outcome(module, x, ids)
        actual = outcome(model, x, ids)
        if expected is None:
            refused += 1
            assert actual is None, f"{name} of {number}: eager refuses it"
        else:
            assert actual is not None, f"{name} of {number}: eager takes it"
            torch.testing.assert_close(actual, expected)
    assert refused > 1 or name == "take_along_dim"  # takes the remainder by the size


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(-1)
        hot = torch.zeros_like(scores)
        return scores * hot.scatter_(1, scores.topk(1, dim=-1)[1], 1)


def test_ids_of_experts_scattered_along_the_sequence() -> None:
    """A mistake that eager shows where the sequence is shorter than the greatest id."""
    torch.manual_seed(0)
    module = Scattered().eval()
    model = moec.compile(module, (torch.randn(2, 6, 8),))
    for shape in ((1, 1, 8), (2, 3, 8), (2, 4, 8), (3, 9, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = outcome(module, x)
        if expected is None:
            words = r"scatter \(.*test_index_checks\.py:\d+.*\) has the index \d, and its indices "
            with pytest.raises(InputError, match=words + "must be from 0 to"):
                model(x)
        else:
            torch.testing.assert_close(model(x), expected)


class Present(nn.Module):
    """Ids below 0 stand for nothing: they are left out before they are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids[ids >= 0]).sum(0)


def test_indices_that_a_mask_leaves_out_may_be_anything() -> None:
    module = Present().eval()
    model = moec.compile(module, (torch.tensor([0, 1, -1, 3]),))
    for ids in ([1, -1, 2], [-5, -1], [3, 3, 3, 3, 2]):
        x = torch.tensor(ids)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x))
    with pytest.raises(InputError, match="has the index 4, and its indices must be from 0 to 3"):
        model(torch.tensor([1, -1, 4]))


NEVER_OUTSIDE = """
graph main(x: f32[T, 4], i: i64[T]; w: f32[4, 3], p: i64[2]) {
  size T in [1, 8]
  v: f32[T, 2], top: i64[T, 2] = aten.topk.default(x) <k=2>
  a: f32[T, 2] = aten.gather.default(x, top) <dim=1>
  line: i64[T] = aten.arange.start_step() <start=0, end={T}, dtype=i64>
  b: f32[T, 4] = aten.index_select.default(x, line) <dim=0>
  mod: i64[T] = aten.remainder.Scalar(i) <other=4>
  c: f32[T, 3] = aten.embedding.default(w, mod)
  flat: i64[2*T] = aten.arange.start_step() <start=0, end={2*T}, dtype=i64>
  half: i64[2*T] = aten.floor_divide.default(flat) <other=2>
  d: f32[2*T, 4] = aten.index.Tensor(x, half) <indices=($1)>
  e: f32[T, 2] = aten.index.Tensor(x, p) <indices=(none, $1)>
  low: i64[T] = aten.clamp.default(i) <min=0, max=3>
  f: f32[T, 3] = aten.embedding.default(w, low)
  return a, b, c, d, e, f
}"""


def test_no_check_where_the_range_is_known() -> None:
    graph = parse(NEVER_OUTSIDE)
    assert with_index_checks(graph, {"p": torch.tensor([0, 3])}) is graph
    text = print_graph(with_index_checks(graph, {"p": torch.tensor([0, 4])}))
    assert re.findall(REQUIRE + r"\((\w+)\)", text) == ["p"]


def test_a_table_of_positions_within_its_bounds() -> None:
    text = """
    graph main(x: f32[T, 4]; w: f32[16, 4]) {
      size T in [1, LONGEST]
      line: i64[T] = aten.arange.start_step() <start=0, end={T}, dtype=i64>
      a: f32[T, 4] = aten.embedding.default(w, line)
      return a
    }"""
    graph = parse(text.replace("LONGEST", "16"))
    assert with_index_checks(graph, {}) is graph
    graph = parse(text.replace("LONGEST", "17"))
    assert with_index_checks(graph, {}) is not graph


REQUIRED = """
graph main(i: i64[T], x: f32[T]) {
  twice: i64[T] = aten.mul.Tensor(i) <other=2>
  inside: i64[T] = moec.require_index(twice) <rows=4, negative=NEGATIVE, what="one_hot">
  y: i64[T] = aten.add.Tensor(inside) <other=1>
  return y
}"""


@pytest.mark.parametrize("negative", [False, True])
def test_the_op(negative: bool) -> None:
    graph = parse(REQUIRED.replace("NEGATIVE", str(negative).lower()))
    compiled = Executor(build(Module.of(Program(graph, {})), host(), backend=CPU))
    x = torch.zeros(2)
    for ids in ([0, 1], [-2, 1], [0, 2], [-3, 0]):
        right = max(ids) < 2 and min(ids) >= (-2 if negative else 0)
        i = torch.tensor(ids)
        if right:
            (y,) = compiled({"i": i, "x": x}).values()
            assert torch.equal(y, i * 2 + 1)
            assert torch.equal(evaluate(graph, [i, x])[0], y)
            continue
        low = -4 if negative else 0
        words = rf"one_hot has the index -?\d, and its indices must be from {low} to 3: PyTorch"
        with pytest.raises(InputError, match=words):
            compiled({"i": i, "x": x})
        with pytest.raises(IndexError, match=words):
            evaluate(graph, [i, x])
