"""prune-experts: fewer experts, with the results of a router with masked columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.ir.ops.routing.routing import Routing, route_logits
from moec.ir.text import print_graph
from moec.passes.approximate.prune_experts import PruneExperts
from tests.passes.changed import (
    LAYER,
    LIMITED,
    change,
    declined,
    graph,
    layers_of,
    outputs,
    program,
    tokens,
)
from tests.passes.masked import kept_by, with_masks

HALF = PruneExperts(keep=0.5)


def test_text(golden):
    golden(print_graph(change(program(1), HALF)[-1].program.graph))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("by", ["usage", "reap", "error", "random"])
def test_it_is_masking(by, scope):
    """The same choices; the numbers differ by no more than the order of sums in one product."""
    original = program(3)
    step = change(original, PruneExperts(keep=0.6, by=by, scope=scope))[-1]
    experts = kept_by(step)
    assert (
        [len(entry) for entry in experts] == [2, 2, 2]
        if scope == "layer"
        else sum(map(len, experts)) == 7
    )
    expected = with_masks(original, experts)
    for seed in range(4):
        ids = tokens(64, seed)
        torch.testing.assert_close(
            outputs(step.program, ids), outputs(expected, ids), rtol=1e-5, atol=1e-5
        )


@given(
    logits=st.lists(
        st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]), min_size=5, max_size=5), max_size=4
    ),
    remaining=st.sets(st.integers(0, 4), min_size=2),
    score=st.sampled_from(["softmax", "none"]),
    renormalize=st.booleans(),
)
def test_picked_columns_route_as_masked_ones(logits, remaining, score, renormalize):
    """Over any scores, ties included: columns that are left out are columns that never win."""
    columns = torch.tensor(sorted(remaining))
    scores = torch.tensor(logits).reshape(-1, 5)
    hidden = torch.full_like(scores, -torch.inf)
    hidden[:, columns] = scores[:, columns]
    routing = Routing(k=2, score=score, after="none" if score == "softmax" else "softmax",
                      renormalize=renormalize)  # fmt: skip
    weights, ids = route_logits(routing, scores[:, columns], None)
    expected, masked_ids = route_logits(routing, hidden, None)
    assert torch.equal(columns[ids], masked_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


@given(
    logits=st.lists(
        st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]), min_size=8, max_size=8), max_size=4
    ),
    worth=st.permutations(range(8)),
    group_score=st.sampled_from(["max", "top2sum"]),
)
def test_groups_stay_as_many(logits, worth, group_score):
    """Eight experts in two groups, four stay: a router that masks the others chooses the same."""
    routing = Routing(k=2, score="sigmoid", groups=2, top_groups=1, group_score=group_score)
    attrs = ", ".join(f"{n}={v!r}".replace("'", '"') for n, v in routing.attrs().items())
    text = LAYER.replace("k=2, renormalize=true", attrs).replace("num_experts=4", "num_experts=8")
    (op,) = [o for o in graph(1, text.replace("f32[B*S, 4]", "f32[B*S, 8]")).ops
             if o.name == "moe.route"]  # fmt: skip
    (layer,) = layers_of(program(1))
    layer = replace(layer, route=op, dispatch=replace(layer.dispatch, attrs={"num_experts": 8}))
    columns = torch.tensor(HALF.experts_to_keep(layer, torch.tensor(worth)))
    assert sum(columns < 4) == 2
    scores, mask = torch.tensor(logits).reshape(-1, 8), torch.full((8,), -torch.inf)
    mask[columns] = 0
    weights, ids = route_logits(routing, scores[:, columns], None)
    expected, masked = route_logits(routing, scores, mask)
    assert torch.equal(columns[ids], masked)
    assert torch.equal(weights, expected)


def test_experts_that_nobody_chooses_cost_nothing():
    """The router's weights favour two experts so much that no token takes the others."""
    original = program()
    for i in range(2):
        router = original.weights[f"layers.{i}.router"]
        router[:] = torch.randn(4, 8) / 100
    # A constant channel decides: experts 1 and 2 always win.
    original.weights["embed"][:, 0] = 5.0
    for i in range(2):
        original.weights[f"layers.{i}.router"][:, 0] = torch.tensor([-3.0, 3.0, 2.0, -4.0])
        original.weights[f"layers.{i}.w2"][:, 0] = 0
    step = change(original, HALF, limit="changed<=0,kl<=1e-6")[-1]
    assert [line.says for line in step.damage.layers] == ["keeps 1, 2 of 4"] * 2
    assert step.damage.after.changed == 0
    ids = tokens(64, 3)
    torch.testing.assert_close(
        outputs(step.program, ids), outputs(original, ids), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("layer", "keep", "says"),
    [
        (LAYER, 1.0, "keep=1 of 4 experts is all of them: nothing would change"),
        (LAYER, 0.25, "keep=0.25 of 4 experts is 1, and each token needs 2"),
        (LAYER.replace("renormalize=true", "groups=2, top_groups=1"), 0.75, "is 3, which 2 groups"),
        (
            LAYER.replace("renormalize=true", "groups=2, top_groups=1"),
            0.5,
            "is 2, and each token needs 2 from 1 groups of 1",
        ),
        (
            LAYER.replace("renormalize=true", 'groups=2, top_groups=2, group_score="top2sum"'),
            0.5,
            "one in each group, and groups are scored by their best two",
        ),
        (
            LAYER.replace("  x#: f32[B*S, 8] =", "  e#: i64[B*S, 2] = aten.neg.default(i#)\n"
                          "  f#: f32[B*S, 2] = aten._to_copy.default(e#) <dtype=f32>\n"
                          "  g#: f32[B*S, 1] = aten.sum.dim_IntList(f#) <dim=(1), keepdim=true>\n"
                          "  z#: f32[B*S, 8] = aten.add.Tensor(y#, g#)\n  x#: f32[B*S, 8] =")
            .replace("(IN, y#)", "(IN, z#)"),
            0.5,
            "the router's choices i0 are also read by aten.neg.default",
        ),
        (
            LAYER.replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, j#)").replace(
                "  rows#:", "  j#: i64[B*S, 2] = aten.abs.default(i#)\n  rows#:"
            ),
            0.5,
            "its choices do not come from a top-k",
        ),
        (
            LAYER.replace("  x#:", "  p#: f32[2*B*S, 8] = aten.neg.default(out#)\n"
                          "  q#: f32[B*S, 8] = moe.combine(p#, order#) <k=2, tokens={B*S}, "
                          "dtype=f32>\n  r#: f32[B*S, 8] = aten.add.Tensor(y#, q#)\n  x#:")
            .replace("(IN, y#)", "(IN, r#)"),
            0.5,
            "rows of the experts are read by more than one moe.combine",
        ),
    ],
    ids=["all", "fewer than k", "uneven groups", "small groups", "pairs", "ids read", "no router",
         "rows read"],
)  # fmt: skip
def test_declines(layer, keep, says):
    assert says in declined(program(1, layer), PruneExperts(keep=keep))


def test_weights_made_from_inputs_are_declined():
    layer = LAYER.replace(
        "layers.#.w2)\n", "w2#)\n"
    ).replace(
        "  rows#:",
        "  one#: f32[B*S, 1] = aten.mean.dim(IN) <dim=(1), keepdim=true>\n"
        "  two#: f32[1, 1] = aten.mean.dim(one#) <dim=(0), keepdim=true>\n"
        "  w2#: f32[4, 8, 6] = aten.mul.Tensor(layers.#.w2, two#)\n  rows#:",
    )  # fmt: skip
    assert "is computed from the inputs, not stored" in declined(program(1, layer), HALF)


def test_logits_of_another_make_are_picked():
    """Where no linear layer with a stored weight makes the logits, their columns are picked."""
    layer = LAYER.replace("moe.route(logits#)", "moe.route(t#)").replace(
        "  w#:", "  t#: f32[B*S, 4] = aten.tanh.default(logits#)\n  w#:", 1
    )
    step = change(program(1, layer), HALF)[-1]
    assert "aten.index_select" in print_graph(step.program.graph)
    assert step.damage.applied


def test_a_capacity_and_a_correction_follow():
    layer = LIMITED.replace("moe.route(logits#)", "moe.route(logits#, layers.#.c)")
    changed = program(1, layer.replace("layers.#.c", "c#").replace(
        "  logits#:", "  c#: f32[4] = aten.sum.dim_IntList(layers.#.router) <dim=(1)>\n  logits#:"
    ))  # fmt: skip
    step = change(changed, HALF)[-1]
    text = print_graph(step.program.graph)
    assert "moe.capacity(i0) <num_experts=2, capacity=3>" in text
    assert step.damage.applied


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 2.0}, "prune-experts: keep is 2.0, expected a number from 0 to 1"),
        ({"keep": "half"}, "keep is 'half', expected a number"),
        ({"by": "size"}, "by is 'size', expected one of usage, reap, error, random"),
        ({"scope": "model"}, "scope is 'model', expected one of layer, global"),
        ({"seed": 0.5}, "seed is 0.5, expected a whole number from 0"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_options_are_refused(options, says):
    with pytest.raises(UsageError) as raised:
        PruneExperts(**options)
    assert says in str(raised.value)
