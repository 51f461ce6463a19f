"""A selection of all elements is removed; any other selection stays."""

from __future__ import annotations

import pytest
import torch

from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse
from moec.passes.core.runner import run
from moec.passes.simplify.canonicalise import Canonicalise

TEXT = """graph main(mask: i64[T, 3], priority: f32[T, 3]) {{
  size T in [5, inf]
  m: f32[T, 3] = aten.mul.Tensor(mask, priority)
  v: f32[{k}, 3], i: i64[{k}, 3] = aten.topk.default(m) <k={number}, dim=0>
  z: i64[T, 3] = aten.full_like.default(mask) <fill_value=0>
  s: i64[T, 3] = aten.scatter.value(z, i) <dim={dim}, value={value}>
  y: i64[T, 3] = aten.mul.Tensor(mask, s)
  return y
}}
"""


def ops(k: str = "T", dim: int = 0, value: int = 1) -> list[str]:
    number = "{T}" if k == "T" else k
    before = Program(parse(TEXT.format(k=k, number=number, dim=dim, value=value)), {})
    after = run(before, [Canonicalise()], stage=Stage.ATEN)[-1].program
    inputs = [torch.randint(2, (7, 3)), torch.rand(7, 3)]
    result, right = (evaluate(p.graph, inputs, p.weights)[0] for p in (after, before))
    assert torch.equal(result, right)
    return [op.name.split(".")[1] for op in after.graph.ops]


def test_every_token_is_selected() -> None:
    assert ops() == []


@pytest.mark.parametrize(
    ("k", "value"), [("5", 1), ("T", 2)], ids=["some tokens", "another number"]
)
def test_what_stays(k: str, value: int) -> None:
    assert ops(k, value=value) != []
