"""Masks that depend on sizes only become attributes; all others stay, with a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from moec.ir.graph import Op, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult, run
from moec.passes.dense import mask_values
from moec.passes.dense.fold_mask import FoldMask

HEAD = """\
graph main(q: f32[B, 4, S, 8], k: f32[B, 2, S, 8], pad: bool[B, S]; table: bool[1, 1, 64, 64]) {{
  size B in {batch}
  size S in {bounds}
  positions: i64[S] = aten.arange.start_step() <start=0, end={{S}}>
  s: i64[1, 1, S, 1] = aten.reshape.default(positions) <shape=(1, 1, {{S}}, 1)>
  l: i64[1, 1, 1, S] = aten.reshape.default(positions) <shape=(1, 1, 1, {{S}})>
"""
TAIL = """\
  y: f32[B, 4, S, 8] = nn.attention(q, k, k, mask) <scale=0.5, masked=true>
  return y
}
"""
CAUSAL = "causal: bool[1, 1, S, S] = aten.le.Tensor(l, s)\n"


def near(width: int, name: str = "near") -> str:
    return (
        f"  {name}_from: i64[1, 1, S, 1] = aten.sub.Tensor(s) <other={width}>\n"
        f"  {name}: bool[1, 1, S, S] = aten.gt.Tensor(l, {name}_from)\n"
    )


def chunks(size: int) -> str:
    return (
        f"  s_chunk: i64[1, 1, S, 1] = aten.div.Tensor_mode(s) <other={size}, "
        'rounding_mode="floor">\n'
        f"  l_chunk: i64[1, 1, 1, S] = aten.div.Tensor_mode(l) <other={size}, "
        'rounding_mode="floor">\n'
        "  same: bool[1, 1, S, S] = aten.eq.Tensor(l_chunk, s_chunk)\n"
    )


def both(a: str, b: str, name: str = "mask", batch: str = "1") -> str:
    return f"  {name}: bool[{batch}, 1, S, S] = aten.bitwise_and.Tensor({a}, {b})\n"


PAD = (
    "  seen: bool[B, 1, 1, S] = aten.reshape.default(pad) <shape=({B}, 1, 1, {S})>\n"
    "  part: bool[B, 1, S, S] = aten.bitwise_and.Tensor(causal, seen)\n"
    "  mask: bool[B, 1, S, S] = aten.expand.default(part) <size=({B}, -1, {S}, {S})>\n"
)
MASKS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "everything": (
        "  mask: f32[1, 1, S, S] = aten.full.default() <size=(1, 1, {S}, {S}), fill_value=0.0, "
        "dtype=f32>\n",
        {},
    ),
    "causal": ("  " + CAUSAL.replace("causal", "mask"), {"causal": True}),
    "window": ("  " + CAUSAL + near(5) + both("causal", "near"), {"causal": True, "window": 5}),
    "window_by_distance": (
        "  " + CAUSAL + "  back: i64[1, 1, S, S] = aten.sub.Tensor(s, l)\n"
        "  near: bool[1, 1, S, S] = aten.le.Scalar(back) <other=4>\n" + both("causal", "near"),
        {"causal": True, "window": 5},
    ),
    "like_an_input": (  # whose sizes it has, and whose data it does not read
        "  ones: bool[B, S] = aten.full_like.default(pad) <fill_value=true>\n"
        "  line: bool[B, 1, 1, S] = aten.reshape.default(ones) <shape=({B}, 1, 1, {S})>\n"
        "  " + CAUSAL + both("causal", "line", batch="B"),
        {"causal": True},
    ),
    "sliced": (
        "  longer: i64[S + 1] = aten.arange.start_step() <start=0, end={S + 1}>\n"
        "  m: i64[1, 1, 1, S + 1] = aten.reshape.default(longer) <shape=(1, 1, 1, {S + 1})>\n"
        "  wide: bool[1, 1, S, S + 1] = aten.le.Tensor(m, s)\n"
        "  back: i64[1, 1, S, 1] = aten.add.Tensor(s) <other=1>\n"
        "  wider: bool[1, 1, S, S + 1] = aten.le.Tensor(m, back)\n"
        "  mask: bool[1, 1, S, S] = aten.slice.Tensor(wider) <dim=3, start=1, end={S + 1}>\n",
        {"causal": True},
    ),
    "chunks": ("  " + CAUSAL + chunks(6) + both("causal", "same"), {"causal": True, "chunk": 6}),
    "chunks_alone": (chunks(6).replace("same:", "mask:"), {"chunk": 6}),
    "added": (
        "  " + CAUSAL + "  zero: f32[] = aten.full.default() <size=(), fill_value=0, dtype=f32>\n"
        "  least: f32[] = aten.scalar_tensor.default() <s=-3.4028234663852886e+38, dtype=f32>\n"
        "  mask: f32[1, 1, S, S] = aten.where.self(causal, zero, least)\n",
        {"causal": True},
    ),
    "triangle": (
        "  ones: bool[S, S] = aten.full.default() <size=({S}, {S}), fill_value=true, dtype=bool>\n"
        "  lower: bool[S, S] = aten.tril.default(ones)\n"
        "  mask: bool[1, 1, S, S] = aten.reshape.default(lower) <shape=(1, 1, {S}, {S})>\n",
        {"causal": True},
    ),
    "table": (
        "  rows: bool[1, 1, S, 64] = aten.slice.Tensor(table) <dim=2, start=0, end={S}>\n"
        "  mask: bool[1, 1, S, S] = aten.slice.Tensor(rows) <dim=3, start=0, end={S}>\n",
        {"causal": True},
    ),
    "padding_stays": ("  " + CAUSAL + PAD, {"causal": True, "masked": True}),
    "documents": (  # what transformers writes to find packed sequences, of which there are none
        "  " + CAUSAL + "  before: i64[S] = aten.sub.Tensor(positions) <other=1>\n"
        "  steps: i64[S] = aten.sub.Tensor(positions, before)\n"
        "  jump: bool[S] = aten.ne.Scalar(steps) <other=1>\n"
        "  document: i64[S] = aten.cumsum.default(jump) <dim=-1>\n"
        "  of_s: i64[1, 1, S, 1] = aten.index.Tensor(document, s) <indices=($1)>\n"
        "  of_l: i64[1, 1, 1, S] = aten.index.Tensor(document, l) <indices=($1)>\n"
        "  equal: bool[1, 1, S, S] = aten.eq.Tensor(of_l, of_s)\n" + both("causal", "equal"),
        {"causal": True},
    ),
}


def text(mask: str, bounds: str = "[1, inf]", batch: str = "[0, inf]") -> str:
    return HEAD.format(bounds=bounds, batch=batch) + mask + TAIL


def folded(source: str) -> PassResult:
    table = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    return run(Program(parse(source), {"table": table}), [FoldMask()])[-1]


def attention(step: PassResult) -> Op:
    (op,) = [op for op in step.program.graph.ops if op.name == "nn.attention"]
    return op


def bounds_of(name: str) -> str:
    return "[1, 64]" if name == "table" else "[1, inf]"


@pytest.mark.parametrize("name", MASKS)
def test_golden(name: str, golden: Callable[[str], None]) -> None:
    golden(print_graph(folded(text(MASKS[name][0], bounds_of(name))).program.graph))


@pytest.mark.parametrize("name", MASKS)
def test_same_numbers(name: str) -> None:
    mask, attrs = MASKS[name]
    source = text(mask, bounds_of(name))
    step = folded(source)
    result = dict(attention(step).attrs)
    assert result.pop("scale") == 0.5
    assert result == attrs
    table = {"table": torch.ones(64, 64, dtype=torch.bool).tril()[None, None]}
    torch.manual_seed(0)
    for batch, length in ((1, 1), (2, 4), (3, 13), (1, 40)):
        q, k = torch.randn(batch, 4, length, 8), torch.randn(batch, 2, length, 8)
        pad = torch.rand(batch, length) < 0.7
        before = evaluate(parse(source), [q, k, pad], table)
        assert torch.equal(evaluate(step.program.graph, [q, k, pad], table)[0], before[0])


@pytest.mark.parametrize("name", MASKS)
def test_single_elements(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mask that is not computed whole, each element is what the whole has there."""
    graph = parse(text(MASKS[name][0], bounds_of(name)))
    mask = graph.ops[-1].inputs[3]
    weights = {"table": torch.ones(64, 64, dtype=torch.bool).tril()[None, None]}
    producers = {value: op for op in graph.ops for value in op.outputs}
    if name == "padding_stays":
        mask = next(value for value in producers if value.name == "causal")
    source = mask_values.cut([mask], graph, weights, producers)
    monkeypatch.setattr(mask_values, "SMALL", 30)
    by_element = mask_values.Elements(source, {"B": 2, "S": 12})
    assert mask not in by_element.computed
    monkeypatch.setattr(mask_values, "SMALL", 10**6)
    full = mask_values.Elements(source, {"B": 2, "S": 12}).computed[mask]
    grids = torch.meshgrid(*map(torch.arange, full.shape), indexing="ij")
    positions = tuple(grid.reshape(-1) for grid in grids)
    assert torch.equal(by_element.at(mask, positions), full.reshape(-1))


def test_single_elements_at_negative_places(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse(
        text(
            "  back: i64[1, 1, S, S] = aten.sub.Tensor(l, s)\n"
            "  turned: i64[1, 1, S, S] = aten.permute.default(back) <dims=(0, 1, 3, 2)>\n"
            "  mask: i64[1, 1, S, S] = aten.index.Tensor(positions, turned) <indices=($1)>\n"
        ).replace("mask)", "pad)")
    )
    (op,) = [op for op in graph.ops if op.name == "aten.index.Tensor"]
    producers = {value: o for o in graph.ops for value in o.outputs}
    source = mask_values.cut(op.outputs, graph, {}, producers)
    monkeypatch.setattr(mask_values, "SMALL", 30)
    at = torch.arange(12)
    zero = torch.zeros(144, dtype=torch.int64)
    positions = (zero, zero, at.repeat_interleave(12), at.repeat(12))
    result = mask_values.Elements(source, {"B": 1, "S": 12}).at(op.outputs[0], positions)
    assert torch.equal(result, (positions[2] - positions[3]) % 12)


def test_a_large_table_is_compared_whole() -> None:
    """One wrong element among a million is found."""
    table = torch.ones(1100, 1100, dtype=torch.bool).tril()[None, None]
    source = text(MASKS["table"][0], "[1, 1100]").replace("64]", "1100]")
    source = source.replace("64, 1100]", "1100, 1100]")
    program = Program(parse(source), {"table": table})
    assert attention(run(program, [FoldMask()])[-1]).attrs["causal"]
    table[0, 0, 777, 333] = False
    assert "neither causal" in run(program, [FoldMask()])[-1].declined[0].reason


def test_a_window_where_keys_are_not_queries() -> None:
    """A query beyond the keys would see none of them, which a mask that is added softens."""
    source = text("  " + CAUSAL + near(5) + both("causal", "near"))
    source = source.replace("k: f32[B, 2, S", "k: f32[B, 2, L").replace(
        "  size B", "  size L in [1, inf]\n  size B"
    )
    source = source.replace("bool[1, 1, S, S]", "bool[1, 1, S, L]").replace(
        "l: i64[1, 1, 1, S] = aten.reshape.default(positions) <shape=(1, 1, 1, {S})>",
        "far: i64[L] = aten.arange.start_step() <start=0, end={L}>\n"
        "  l: i64[1, 1, 1, L] = aten.reshape.default(far) <shape=(1, 1, 1, {L})>",
    )
    assert "neither causal" in folded(source).declined[0].reason
    causal = source.replace("aten.bitwise_and.Tensor(causal, near)", "aten.clone.default(causal)")
    causal = causal.replace("k, k, mask", "k, k, causal")
    assert attention(folded(causal)).attrs == {"scale": 0.5, "causal": True}


def test_large_chunks_that_start_elsewhere() -> None:
    shifted = (
        "  s1: i64[1, 1, S, 1] = aten.add.Tensor(s) <other=1>\n"
        "  l1: i64[1, 1, 1, S] = aten.add.Tensor(l) <other=1>\n"
    )
    parts = chunks(8192).replace("Tensor_mode(s)", "Tensor_mode(s1)")
    parts = parts.replace("Tensor_mode(l)", "Tensor_mode(l1)")
    mask = "  " + CAUSAL + shifted + parts + both("causal", "same")
    assert "neither causal" in folded(text(mask)).declined[0].reason


@pytest.mark.parametrize("limit", [8192, 100_000])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_large_limits(kind: str, limit: int) -> None:
    """A mask of S by S at 2*limit + 3 would not fit in memory."""
    mask = "  " + CAUSAL
    mask += near(limit) + both("causal", "near") if kind == "window" else ""
    mask += chunks(limit) + both("causal", "same") if kind == "chunk" else ""
    start = time.perf_counter()
    assert attention(folded(text(mask))).attrs[kind] == limit
    assert time.perf_counter() - start < 20


def test_within_bounds_a_window_may_be_no_limit() -> None:
    mask = "  " + CAUSAL + near(64) + both("causal", "near")
    assert "window" not in attention(folded(text(mask, "[1, 64]"))).attrs
    assert attention(folded(text(mask, "[1, 65]"))).attrs["window"] == 64


def test_one_batch_item_differs() -> None:
    """Batch 0 sees everything, the others are causal: no form, though batch 1 alone has one."""
    mask = (
        "  " + CAUSAL + "  items: i64[B] = aten.arange.start_step() <start=0, end={B}>\n"
        "  item: i64[B, 1, 1, 1] = aten.reshape.default(items) <shape=({B}, 1, 1, 1)>\n"
        "  first: bool[B, 1, 1, 1] = aten.eq.Scalar(item) <other=0>\n"
        "  mask: bool[B, 1, S, S] = aten.bitwise_or.Tensor(causal, first)\n"
    )
    assert "neither causal" in folded(text(mask)).declined[0].reason
    assert attention(folded(text(mask, batch="[1, 1]"))).attrs == {"scale": 0.5}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (
            "  mask: bool[B, 1, 1, S] = aten.reshape.default(pad) <shape=({B}, 1, 1, {S})>\n",
            "the mask depends on the values of pad, not only on sizes",
        ),
        (
            "  mask: bool[1, 1, S, S] = aten.lt.Tensor(l, s)\n",
            "the mask is neither causal nor a window, nor chunks, nor all True (at B=1, S=1)",
        ),
        (
            "  " + CAUSAL + near(20) + "  far: bool[1, 1, S, S] = aten.logical_not.default(near)\n"
            "  mask: bool[1, 1, S, S] = aten.bitwise_and.Tensor(causal, far)\n",
            "the mask is neither causal nor a window, nor chunks, nor all True (at B=1, S=1)",
        ),
        (
            "  far: i64[1, 1, S, S] = aten.sub.Tensor(l, s)\n"
            "  mask: f32[1, 1, S, S] = aten._to_copy.default(far) <dtype=f32>\n",
            "the mask adds other numbers than 0 and -inf to the scores",
        ),
        (
            "  square: i64[1, 1, S, 1] = aten.mul.Tensor(s, s)\n"
            "  mask: bool[1, 1, S, S] = aten.le.Tensor(l, square)\n",
            "the mask is computed with aten.mul.Tensor, for which no rule is known",
        ),
        (
            "  sine: f32[1, 1, S, 1] = aten.sin.default(s)\n"
            "  mask: bool[1, 1, S, S] = aten.le.Tensor(l, sine)\n",
            "the mask is computed with aten.sin.default, for which no rule is known",
        ),
        (
            "  rows: bool[1, 1, S, 64] = aten.slice.Tensor(table) <dim=2, start=0, end={S}>\n"
            "  mask: bool[1, 1, S, S] = aten.slice.Tensor(rows) <dim=3, start=0, end={S}>\n",
            "the mask is read from table, and S has no small bound",
        ),
        (
            "  " + CAUSAL + near(10**6) + both("causal", "near"),
            "the mask has a constant of 1000000, too large to analyse",
        ),
        (
            "  number: i64[] = aten.sum.default(pad)\n"
            '  count: i64[] = moec.size(number) <name="u0">\n'
            "  some: i64[u0] = aten.arange.start_step() <start=0, end={u0}>\n"
            "  back: i64[S] = aten.slice.Tensor(some) <dim=0, start=0, end={S}>\n"
            "  l2: i64[1, 1, 1, S] = aten.reshape.default(back) <shape=(1, 1, 1, {S})>\n"
            "  mask: bool[1, 1, S, S] = aten.le.Tensor(l2, s)\n",
            "the mask depends on the size u0, which is read from data",
        ),
    ],
    ids=["padding", "strict", "far", "distance", "square", "sine", "table", "huge", "data"],
)
def test_declined(mask: str, reason: str) -> None:
    step = folded(text(mask))
    assert [d.reason for d in step.declined] == [reason]
    assert attention(step).attrs["masked"]


def test_declined_beside_a_window() -> None:
    source = text(MASKS["causal"][0]).replace("<scale", "<window=3, scale")
    reason = "the attention has a window or chunks besides its mask"
    assert [d.reason for d in folded(source).declined] == [reason]


def test_a_rule_that_starts_late() -> None:
    """Causal up to query 300, everything after: sizes around the constant show it."""
    mask = (
        "  " + CAUSAL + "  late: bool[1, 1, S, 1] = aten.gt.Scalar(s) <other=300>\n"
        "  mask: bool[1, 1, S, S] = aten.bitwise_or.Tensor(causal, late)\n"
    )
    assert "(at B=1, S=601)" in folded(text(mask)).declined[0].reason
    assert attention(folded(text(mask, "[1, 300]"))).attrs["causal"]
