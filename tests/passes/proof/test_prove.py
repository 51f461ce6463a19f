"""A proof must include sizes at which a fixed limit is reached."""

from dataclasses import replace

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.sizes.dims import Bounds
from moec.ir.text import parse
from moec.passes.proof import prove
from moec.passes.proof.input_generators import Feed, Flags, InputKind
from moec.passes.proof.prove import Prover
from moec.passes.proof.random_params import corrections
from moec.passes.recognise.region import Scope


def counted(limit: int | None) -> Graph:
    """x if fewer than `limit` positive values precede it in its column."""
    mask = (
        f"kept: bool[T, 4] = aten.le.Scalar(place) <other={limit}>"
        if limit is not None
        else "kept: bool[T, 4] = aten.ge.Scalar(place) <other=0>"
    )
    return parse(f"""
    graph main(x: f32[T, 4]) {{
      positive: bool[T, 4] = aten.gt.Scalar(x) <other=0>
      one: i64[T, 4] = aten._to_copy.default(positive) <dtype=i64>
      place: i64[T, 4] = aten.cumsum.default(one) <dim=0>
      {mask}
      y: f32[T, 4] = aten.mul.Tensor(x, kept)
      return y
    }}""")


def with_inputs_of(graph: Graph, other: Graph) -> Graph:
    """`other`, over the very input values of `graph`."""
    new = dict(zip(other.inputs, graph.inputs, strict=True))
    ops = tuple(replace(op, inputs=tuple(new.get(v, v) for v in op.inputs)) for op in other.ops)
    return replace(other, inputs=graph.inputs, ops=ops)


def feeds(graph: Graph) -> dict[Value, Feed]:
    return {graph.inputs[0]: InputKind.POSITIVE}


@pytest.mark.parametrize("limit", [3, 20, 300])
def test_a_limit_that_is_left_out_is_seen(limit):
    before = counted(limit)
    Prover({}).prove(before, with_inputs_of(before, counted(limit)), feeds(before))
    with pytest.raises(NoMatch):
        Prover({}).prove(before, with_inputs_of(before, counted(None)), feeds(before))


def test_a_limit_that_cannot_be_reached_is_said():
    before = counted(100_000)
    with pytest.raises(NoMatch, match="counts up to 100000, and the proof goes up to 2048 tokens"):
        Prover({}).prove(before, with_inputs_of(before, counted(None)), feeds(before))


def first_rows(rows):
    return parse(f"""
    graph main(x: f32[T, 4]) {{
      first: f32[{rows}, 4] = aten.slice.Tensor(x) <dim=0, start=0, end={{{rows}}}>
      y: f32[4] = aten.sum.dim_IntList(first) <dim=(0,)>
      return y
    }}""")


def test_a_size_that_is_another_beyond_the_proof_is_said():
    before = first_rows("Min(3000, T)")
    with pytest.raises(NoMatch, match="counts up to 3000, and the proof goes up to 2048 tokens"):
        Prover({}).prove(before, before, feeds(before))


@pytest.mark.parametrize("rows", ["Min(64, T)", "T - Max(0, T - 64)"])
def test_a_size_that_is_another_beyond_a_number_is_seen(rows):
    """Up to 64 rows, the first 64 are all rows."""
    before = first_rows(rows)
    after = parse("""
    graph main(x: f32[T, 4]) {
      y: f32[4] = aten.sum.dim_IntList(x) <dim=(0,)>
      return y
    }""")
    Prover({}).prove(before, before, feeds(before))
    with pytest.raises(NoMatch, match="T=73"):
        Prover({}).prove(before, with_inputs_of(before, after), feeds(before))


def test_what_differs_at_once_costs_two_runs(monkeypatch):
    runs = []

    def counted_run(*args):
        runs.append(args)
        return run_graph(*args)

    monkeypatch.setattr(prove, "run_graph", counted_run)
    before, prover = counted(3), Prover({})
    with pytest.raises(NoMatch):
        prover.prove(before, with_inputs_of(before, negated()), feeds(before))
    assert len(runs) == 2
    prover.prove(before, with_inputs_of(before, counted(3)), feeds(before))
    assert len(runs) > 2


@pytest.mark.parametrize("explained", [True, False])
def test_a_wrong_replacement_costs_one_case_unless_its_reason_is_reported(explained):
    """One outcome of a decision is the better reason, but takes all cases to see."""
    before = parse("""
    graph main(x: f32[T, 4]) {
      far: bool[T, 4] = aten.gt.Scalar(x) <other=1000.0>
      y: f32[T, 4] = aten.where.self(far, x, x)
      return y
    }""")
    wrong = with_inputs_of(before, negated())
    prover, decisions = Prover({}), [before.ops[0]]
    reason = "has the same result on all random" if explained else "the numbers differ"
    with pytest.raises(NoMatch, match=reason):
        prover.prove(before, wrong, {}, decisions=decisions, explained=explained)
    (cases,) = prover.runs.values()
    assert (len(cases.computed) == 1) is not explained
    right = replace(before, ops=(), outputs=before.inputs)
    with pytest.raises(NoMatch, match="has the same result on all random"):
        prover.prove(before, right, {}, decisions=decisions, explained=explained)


def test_a_region_that_cannot_be_run_is_refused_for_every_replacement():
    """It runs with 5 rows and fails with 13: the second replacement may not pass on the 5."""
    before = parse("""
    graph main(x: f32[T, 4]) {
      y: f32[5, 4] = aten.reshape.default(x) <shape=(5, 4)>
      return y
    }""")
    again = parse("""
    graph main(x: f32[T, 4]) {
      y: f32[5, 4] = aten.slice.Tensor(x) <start=0, end=5>
      return y
    }""")
    before = replace(before, bounds={"T": Bounds(5)})
    prover = Prover({})
    for after in (before, with_inputs_of(before, again)):
        with pytest.raises(NoMatch, match="it fails on random inputs"):
            prover.prove(before, after, feeds(before))


def negated() -> Graph:
    return parse("""
    graph main(x: f32[T, 4]) {
      y: f32[T, 4] = aten.neg.default(x)
      return y
    }""")


def scaled(rows: int) -> Graph:
    return parse(f"""
    graph main(x: f32[T, 64]; w: f32[{rows}, 64]) {{
      y: f32[T, {rows}] = aten.linear.default(x, w)
      return y
    }}""")


@pytest.mark.parametrize(("rows", "pools"), [(64, 0), (512, 1)])
def test_small_weights_need_no_pool(rows: int, pools: int) -> None:
    """A pool has four million numbers, and each proof with weights of another width made one."""
    graph, prover = scaled(rows), Prover({})
    prover.prove(graph, graph, feeds(graph))
    assert len(prover.params.pools) == pools


def test_what_is_zero_on_all_inputs_proves_nothing():
    """Positions that are never drawn above 3 close every expert: any block would agree."""
    before, after = (
        parse(f"""
        graph main(x: f32[T, 4], positions: i64[T, 1]) {{
          late: bool[T, 1] = aten.gt.Scalar(positions) <other={limit}>
          y: f32[T, 4] = aten.mul.Tensor(x, late)
          return y
        }}""")
        for limit in (3, 5)
    )
    _, positions = before.inputs
    after = with_inputs_of(before, after)
    with pytest.raises(NoMatch, match="its result is 0 on all random inputs"):
        Prover({}).prove(before, after, {positions: Flags()})
    with pytest.raises(NoMatch, match="the numbers differ"):
        Prover({}).prove(before, after, {positions: Flags((3,))})
    Prover({}).prove(before, before, {positions: Flags((3,))})


CORRECTED = """
graph main(scores: f32[T, 4]; correction: f32[4]) {
  s: f32[T, 4] = aten.sigmoid.default(scores)
  c: f32[T, 4] = aten.add.Tensor(s, correction)
  w: f32[T, 2], ids: i64[T, 2] = aten.topk.default(c) <k=2, dim=-1>
  first: i64[T] = aten.select.int(ids) <dim=1, index=0>
  hot: bool[T] = aten.eq.Scalar(first) <other=0>
  y: f32[T] = aten._to_copy.default(hot) <dtype=f32>
  return y
}"""


def test_corrections_do_not_decide_all_choices():
    """A correction that is as large as its shape suggests sends all tokens to the same experts."""
    before = parse(CORRECTED)
    assert {value.name for value in corrections(before)} == {"correction"}
    prover = Prover({})
    prover.prove(before, before, {before.inputs[0]: InputKind.LOGITS})
    (cases,) = prover.runs.values()
    random = next(case for case in cases.computed if case.name.startswith("random; T=13"))
    assert 0 < float(random.result[0].sum()) < 13


def test_a_region_reads_what_is_drawn_where_it_begins_at_one_of_two_results():
    """The indices of a top-k whose values the region computes: those computed replaced the drawn,
    so that no case had a full expert."""
    graph = parse("""
    graph main(x: f32[T, 4]) {
      w: f32[T, 2], ids: i64[T, 2] = aten.topk.default(x) <k=2, dim=-1>
      last: i64[T] = aten.select.int(ids) <dim=1, index=1>
      y: f32[T, 2] = aten.mul.Tensor(w, ids)
      return y
    }""")
    values = {value.name: value for value in graph.values()}
    region = Scope(graph).cut([values["y"]], [values["x"], values["ids"]])
    ids = torch.tensor([[2, 3]])
    (y,) = run_graph(region, [torch.tensor([[4.0, 3.0, 2.0, 1.0]]), ids])
    assert y.tolist() == [[8.0, 9.0]]
