"""The references of moec's ops against explicit sums, for any routing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.interpret.evaluate import evaluate
from moec.ir.ops.experts.dispatch import sort_choices
from moec.ir.ops.routing.routing import Routing, route_logits, top_k
from moec.ir.text import parse


@st.composite
def choices(draw):
    experts, k, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(0, 9))
    ids = draw(
        st.lists(st.integers(0, experts), min_size=tokens * k, max_size=tokens * k)
    )  # `experts` itself is the sentinel
    return experts, torch.tensor(ids, dtype=torch.int64).reshape(tokens, k)


@given(choices())
def test_sort(drawn):
    count, experts = drawn
    order, slots, ends = sort_choices(experts, count)
    flat = experts.reshape(-1)
    assert flat[order.long()].tolist() == sorted(flat.tolist())
    assert order[slots.reshape(-1).long()].tolist() == list(range(flat.numel()))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows_of_expert = order[start:end].tolist()
        assert rows_of_expert == [i for i, e in enumerate(flat.tolist()) if e == expert]
        start = end


def layer(experts: int, k: int, side: str) -> str:
    dispatch, combine = ("x, i, w", "") if side == "input" else ("x, i", ", w")
    weighted = "false" if side == "input" else "true"
    return f"""
    graph main(x: f32[T, 3], i: i64[T, {k}], w: f32[T, {k}]; m: f32[{experts}, 3, 3]) {{
      rows: f32[{k}*T, 3], order: i32[{k}*T], ends: i32[{experts}] =
        moe.dispatch({dispatch}) <num_experts={experts}>
      out: f32[{k}*T, 3] = moe.experts(rows, ends, m) {{
        graph body(bx: f32[R, 3]; bm: f32[3, 3]) {{
          y: f32[R, 3] = aten.linear.default(bx, bm)
          return y
        }}
      }}
      y: f32[T, 3] =
        moe.combine(out, order{combine}) <k={k}, tokens={{T}}, dtype=f32, weighted={weighted}>
      return y
    }}"""


@pytest.mark.parametrize("side", ["input", "output"])
@given(drawn=choices(), seed=st.integers(0, 99))
def test_dispatch_experts_combine(side, drawn, seed):
    count, experts = drawn
    tokens, k = experts.shape
    torch.manual_seed(seed)
    x, w, m = torch.randn(tokens, 3), torch.rand(tokens, k), torch.randn(count, 3, 3)
    (y,) = evaluate(parse(layer(count, k, side)), [x, experts, w], {"m": m})
    expected = torch.zeros(tokens, 3)
    for t in range(tokens):
        for s in range(k):
            if experts[t, s] < count:
                expected[t] += w[t, s] * (m[experts[t, s]] @ x[t])
    # Three products of numbers near one, summed in another order: a few units in the last place.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_id_and_nan_is_greatest():
    assert top_k(torch.tensor([1.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert top_k(torch.tensor([1.0, torch.nan, 2.0]), 2).tolist() == [1, 2]
    assert top_k(torch.tensor([3.0, 3.0, 3.0]), 3).tolist() == [0, 1, 2]


@given(seed=st.integers(0, 999), k=st.integers(1, 4))
def test_softmax_before_and_after_agree_with_torch(seed, k):
    torch.manual_seed(seed)
    logits = torch.randn(5, 4)
    values, ids = logits.softmax(-1).topk(k)
    weights, experts = route_logits(Routing(k, renormalize=True), logits, None)
    assert torch.equal(experts, ids)
    torch.testing.assert_close(weights, values / values.sum(-1, keepdim=True))
    after, experts = route_logits(Routing(k, score="none", after="softmax"), logits, None)
    assert torch.equal(experts, ids)
    # softmax over the chosen logits is the renormalised softmax over all
    torch.testing.assert_close(after, weights)


def test_groups_forbid_experts_outside_the_best():
    logits = torch.tensor([[9.0, 0.0, 5.0, 5.0]])  # groups {0, 1} and {2, 3}
    best_sum = Routing(2, score="none", groups=2, top_groups=1, group_score="top2sum")
    best_one = Routing(2, score="none", groups=2, top_groups=1, group_score="max")
    assert route_logits(best_sum, logits, None)[1].tolist() == [[2, 3]]
    assert route_logits(best_one, logits, None)[1].tolist() == [[0, 1]]


def test_a_correction_chooses_but_does_not_weigh():
    logits = torch.tensor([[0.0, 1.0]])
    weights, experts = route_logits(Routing(1, score="sigmoid"), logits, torch.tensor([10.0, 0.0]))
    assert experts.tolist() == [[0]]
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


@pytest.mark.parametrize(
    ("order", "remaining"),
    [("slot", [[0, 2], [2, 0], [2, 2]]), ("token", [[0, 0], [2, 2], [2, 2]])],
)
def test_capacity_drops(order, remaining):
    graph = parse(
        f"""graph main(i: i64[T, 2]) {{
          y: i64[T, 2] = moe.capacity(i) <num_experts=2, capacity=2, order="{order}">
          return y
        }}"""
    )
    experts = torch.tensor([[0, 0], [0, 0], [0, 0]])
    if order == "slot":  # first choices first: tokens 0 and 1
        remaining = [[0, 2], [0, 2], [2, 2]]
    assert evaluate(graph, [experts])[0].tolist() == remaining
