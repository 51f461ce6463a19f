"""Write a pass: a rule that rewrites ops of a graph, or declines with a reason.

    a = clamp(x) <min=a, max=b>
    b = clamp(a) <min=c, max=d>      ->      b = clamp(x) <min=max(a, c), max=min(b, d)>

The rule is exact for every number, including NaN and the infinities, if the two ranges overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core import runner
from moec.passes.core.rewrite import Builder, rewrite

CLAMP = "aten.clamp.default"


@dataclass(frozen=True)
class MergeClamps(runner.Pass):
    """Clamp once where a clamp follows a clamp."""

    name: ClassVar[str] = "merge-clamps"
    takes: ClassVar[Stage] = Stage.GROUPED  # every graph that has aten ops
    gives: ClassVar[Stage] = Stage.ATEN  # it adds no op of a later stage

    def run(self, program: Program, log: runner.Log) -> Program:
        return Program(rewrite(program.graph, merge_clamps, log), program.weights)


def merge_clamps(op: Op, builder: Builder) -> Sequence[Value] | None:
    """The values that replace `op`'s results, or None to leave it unchanged."""
    if op.name != CLAMP:
        return None
    inner = builder.producers.get(op.inputs[0])
    if inner is None or inner.name != CLAMP:
        return None
    (a, b), (c, d) = ((o.attrs["min"], o.attrs["max"]) for o in (inner, op))
    low, high = max(a, c), min(b, d)
    if low > high:
        raise NoMatch(f"[{a}, {b}] and [{c}, {d}] do not meet: the result is a constant")
    types = [value.type for value in op.outputs]
    return builder.emit(CLAMP, inner.inputs, types, like=op, attrs={"min": low, "max": high})


graph = parse("""
graph main(x: f32[T, 8]) {
  size T in [0, inf]
  a: f32[T, 8] = aten.clamp.default(x) <min=-1.0, max=4.0> @ layers.0
  b: f32[T, 8] = aten.clamp.default(a) <min=0.0, max=6.0> @ layers.0
  c: f32[T, 8] = aten.clamp.default(x) <min=-2.0, max=-1.0> @ layers.1
  d: f32[T, 8] = aten.clamp.default(c) <min=0.0, max=6.0> @ layers.1
  return b, d
}
""")

before, after = runner.run(Program(graph, {}), [MergeClamps()])
print(after)
for declined in after.declined:
    print(f"declined at {declined.where}: {declined.reason}")
print(print_graph(after.program.graph))

x = torch.tensor([[-9.0, -1.5, -0.0, 0.5, 5.0, torch.nan, torch.inf, -torch.inf]])
old, new = (evaluate(step.program.graph, [x], {}) for step in (before, after))
torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
print("the numbers are the same")
