"""Equivalent ops get one form."""

import math

import pytest
import torch

from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import run
from moec.passes.simplify.canonicalise import Canonicalise


def canonical(ops: str, outputs: str = "y") -> Graph:
    graph = parse(
        f"graph main(x: f32[T, 4], n: i64[T], z: f32[T, 1, 4]; w: f32[3, 4], v: f32[4, 3], "
        f"b: f32[3]) {{\n{ops}\nreturn {outputs}\n}}"
    )
    return run(Program(graph, {}), [Canonicalise()])[-1].program.graph


CASES = {
    "mm of a transposed weight": "wt: f32[4, 3] = aten.t.default(w)\n"
    "y: f32[T, 3] = aten.mm.default(x, wt)",
    "mm of a weight as it is": "y: f32[T, 3] = aten.mm.default(x, v)",
    "addmm": "wt: f32[4, 3] = aten.transpose.int(w) <dim0=0, dim1=1>\n"
    "y: f32[T, 3] = aten.addmm.default(b, x, wt)",
    "addmm with a scaled bias stays": "wt: f32[4, 3] = aten.t.default(w)\n"
    "y: f32[T, 3] = aten.addmm.default(b, x, wt) <beta=2>",
    "unsqueeze and squeeze": "u: f32[T, 1, 4] = aten.unsqueeze.default(x) <dim=1>\n"
    "y: f32[T, 4] = aten.squeeze.dim(u) <dim=1>",
    "two permutes": "p: f32[4, T] = aten.permute.default(x) <dims=(1, 0)>\n"
    "y: f32[T, 4] = aten.permute.default(p) <dims=(1, 0)>",
    "nothing": "c: f32[T, 4] = aten.clone.default(x)\n"
    "s: f32[T, 4] = aten.slice.Tensor(c) <dim=0, start=0, end=9223372036854775807>\n"
    "y: f32[T, 4] = aten.neg.default(s)",
    "integers plus zero": "m: i64[T] = aten.add.Tensor(n) <other=0>\n"
    "y: i64[T] = aten.neg.default(m)",
    "floats plus zero stay": "m: f32[T, 4] = aten.add.Tensor(x) <other=0>\n"
    "y: f32[T, 4] = aten.neg.default(m)",
    "floats times one": "m: f32[T, 4] = aten.mul.Tensor(x) <other=1.0>\n"
    "y: f32[T, 4] = aten.neg.default(m)",
    "the only element of an axis": "y: f32[T, 4] = aten.select.int(z) <dim=1, index=0>",
    "a mask": "m: bool[T] = aten.gt.Scalar(n) <other=0>\n"
    "r: f32[u0, 4] = aten.index.Tensor(x, m) <indices=($1)>\n"
    "y: f32[T, 4] = aten.index_put.default(x, m, r) <indices=($1), accumulate=true>",
    "a mask over two axes": "m: bool[T, 4] = aten.gt.Scalar(x) <other=0>\n"
    "y: f32[u0] = aten.index.Tensor(x, m) <indices=($1)>",
    "one value for all of a mask stays": "m: bool[T] = aten.gt.Scalar(n) <other=0>\n"
    "r: f32[1, 4] = aten.slice.Tensor(x) <dim=0, start=0, end=1>\n"
    "y: f32[T, 4] = aten.index_put.default(x, m, r) <indices=($1)>",
    "rows scattered by their mask": "m: bool[T] = aten.gt.Scalar(n) <other=0>\n"
    "c: bool[T, 1] = aten.unsqueeze.default(m) <dim=1>\n"
    "r: f32[u0, 4] = aten.index.Tensor(x, m) <indices=($1)>\n"
    "y: f32[T, 4] = aten.masked_scatter.default(x, c, r)",
    "rows scattered by another mask stay": "m: bool[T] = aten.gt.Scalar(n) <other=0>\n"
    "o: bool[T] = aten.gt.Scalar(n) <other=1>\n"
    "c: bool[T, 1] = aten.unsqueeze.default(o) <dim=1>\n"
    "r: f32[u0, 4] = aten.index.Tensor(x, m) <indices=($1)>\n"
    "y: f32[T, 4] = aten.masked_scatter.default(x, c, r)",
    "features of images": "m: bool[T] = aten.gt.Scalar(n) <other=0>\n"
    "c: bool[T, 1] = aten.unsqueeze.default(m) <dim=1>\n"
    "e: bool[T, 4] = aten.expand.default(c) <size=({T}, 4)>\n"
    "y: f32[T, 4] = aten.masked_scatter.default(x, e, z)",
    "features added to rows of a mask": "m: bool[T] = aten.gt.Scalar(n) <other=1>\n"
    "r: f32[3, 4] = aten.index.Tensor(x, m) <indices=($1)>\n"
    "f: f32[3, 4] = aten.neg.default(w)\n"
    "s: f32[3, 4] = aten.add.Tensor(r, f)\n"
    "y: f32[T, 4] = aten.index_put.default(x, m, s) <indices=($1)>",
    "values of a mask": "m: bool[T, 4] = aten.gt.Scalar(x) <other=0>\n"
    "y: f32[T, 4] = aten.masked_scatter.default(x, m, z)",
    "buckets": "y: i64[T, 4] = aten.bucketize.Tensor(x, b)",
    "buckets closed on the right": "y: i64[T, 4] = aten.bucketize.Tensor(x, b) <right=true>",
    "a strided slice stays": "y: f32[T, 4] = aten.slice.Tensor(x) <dim=1, start=0, end=4, step=1>",
}


@pytest.mark.parametrize("ops", CASES.values(), ids=CASES.keys())
def test_spelling(ops, golden):
    golden(print_graph(canonical(ops)))


def test_it_is_idempotent():
    for ops in CASES.values():
        once = canonical(ops)
        again = run(Program(once, {}), [Canonicalise()])[-1]
        assert print_graph(again.program.graph) == print_graph(once)


@pytest.mark.parametrize("ops", CASES.values(), ids=CASES.keys())
def test_the_numbers_hold(ops):
    text = (
        "graph main(x: f32[T, 4], n: i64[T], z: f32[T, 1, 4]; w: f32[3, 4], v: f32[4, 3], "
        f"b: f32[3]) {{\n{ops}\nreturn y\n}}"
    )
    before = parse(text)
    inputs = [torch.randn(5, 4), torch.arange(5), torch.randn(5, 1, 4)]
    inputs[0][2, 1] = math.nan if "bucketize" in ops else 0.0
    weights = {"w": torch.randn(3, 4), "v": torch.randn(4, 3), "b": torch.randn(3).sort().values}
    after = run(Program(before, weights), [Canonicalise()])[-1].program.graph
    # The same products and sums, of which torch may choose another order.
    torch.testing.assert_close(
        evaluate(after, inputs, weights), evaluate(before, inputs, weights), rtol=1e-6, atol=1e-6
    )
