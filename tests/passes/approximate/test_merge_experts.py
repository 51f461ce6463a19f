"""merge-experts: clusters by outputs, aligned neurons, preserved routing mass."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moec
from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph
from moec.passes.approximate.merge_experts import (
    MergeExperts,
    assign,
    cluster_experts,
    merge_weights,
    neuron_axes,
)
from tests.capture.modules import WIDTH, Moe
from tests.passes.changed import LAYER, change, declined, graph, outputs, program, tokens

HALF = MergeExperts(keep=0.5)


def pairs(layer: str = LAYER) -> Program:
    """Experts 0 and 2 are one but for the order of their neurons, and so are 1 and 3."""
    changed = program(2, layer)
    for i in range(2):
        for a, b in ((0, 2), (1, 3)):
            order = torch.randperm(6)
            for name in ("w1", "w3"):
                stack = changed.weights[f"layers.{i}.{name}"]
                stack[b] = stack[a][order]
            stack = changed.weights[f"layers.{i}.w2"]
            stack[b] = stack[a][:, order]
    return changed


def test_text(golden):
    golden(print_graph(change(program(1), HALF)[-1].program.graph))


@pytest.mark.parametrize("score", ["renormalize=true", 'score="none", after="softmax"'])
def test_equal_experts_merge_without_damage_where_one_of_them_is_chosen(score):
    """k is 1, so that a token goes to the heavier pair; its weight is then 1."""
    layer = (
        LAYER.replace("k=2, renormalize=true", f"k=1, {score}")
        .replace("f32[B*S, 2], i#: i64[B*S, 2]", "f32[B*S, 1], i#: i64[B*S, 1]")
        .replace("f32[2*B*S", "f32[B*S")
        .replace("i32[2*B*S]", "i32[B*S]")
        .replace("k=2, tokens", "k=1, tokens")
    )
    original = pairs(layer)
    for i in range(2):  # scores of a pair are equal too: the heavier pair holds the best expert
        router = original.weights[f"layers.{i}.router"]
        router[2:] = router[:2]
    step = change(original, HALF)[-1]
    assert [line.says for line in step.damage.layers] == ["merges 0+2, 1+3 of 4"] * 2
    ids = tokens(64, 5)
    torch.testing.assert_close(
        outputs(step.program, ids), outputs(original, ids), rtol=1e-4, atol=1e-4
    )


def test_neurons_are_put_in_one_order_before_they_are_averaged():
    """Experts 0 and 2 are equal but for their neurons' order: their mean is either of them."""
    original = pairs()
    (op, _) = [o for o in original.graph.ops if o.name == "moe.experts"]
    stacks = {
        param: original.weights[stack.name]
        for param, stack in zip(op.body.params, op.inputs[2:], strict=True)
    }
    mean = merge_weights(stacks, neuron_axes(op.body), (0, 2), torch.tensor([5, 0, 3, 0]))
    for param, stack in stacks.items():
        torch.testing.assert_close(mean[param], stack[0], rtol=1e-6, atol=1e-6)
    mean = merge_weights(stacks, neuron_axes(op.body), (0, 1), torch.tensor([3, 1, 0, 0]))
    (first, *_) = stacks
    bound = 0.75 * stacks[first][0].norm(dim=1) - 0.25 * stacks[first][1].norm(dim=1).max()
    assert (mean[first].norm(dim=1) > bound).all()  # three quarters of expert 0, in its own order
    assert not torch.equal(mean[first], stacks[first][0])


def test_a_merged_score_is_the_sum_of_its_members():
    original = program(1)
    step = change(original, HALF)[-1]
    (route,) = [op for op in step.program.graph.ops if op.name == "moe.route"]
    (groups,) = [t for name, t in step.program.weights.items() if name.endswith(".members")]
    graph = replace(step.program.graph, outputs=route.inputs)
    (score,) = evaluate(graph, [tokens(32)], step.program.weights)
    h = original.weights["embed"][tokens(32).flatten()]
    share = (h @ original.weights["layers.0.router"].T).softmax(-1)
    torch.testing.assert_close(score.softmax(-1), share @ groups.float().T, rtol=1e-5, atol=1e-6)
    assert groups.sum(0).tolist() == [1] * 4


def test_all_is_measured_and_saved():
    step = change(program(2), HALF)[-1]
    for line in step.damage.layers:
        assert line.bytes_saved == 4 * 2 * 3 * 48 - 2 * 4  # two experts, less `members`
        assert 0 < line.changed <= 1
    assert step.damage.after.kl > 0


def test_clusters():
    """Rows 0, 3 and 4 point one way, 1 the other way, 2 aside; length does not matter."""
    rows = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [5, 0.1], [2, 0.2]])
    assert cluster_experts(rows, 5) == ((0,), (1,), (2,), (3,), (4,))
    assert cluster_experts(rows, 3) == ((0, 3, 4), (1,), (2,))
    assert cluster_experts(torch.zeros(3, 2), 1) == ((0, 1, 2),)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_the_assignment_is_the_best_of_all(n, seed, ties):
    rng = np.random.default_rng(seed)
    gain = rng.integers(-3, 4, (n, n)).astype(float) if ties else rng.normal(size=(n, n))
    columns = assign(torch.from_numpy(gain)).tolist()
    assert sorted(columns) == list(range(n))
    best = max(sum(gain[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert sum(gain[i, columns[i]] for i in range(n)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("layer", "keep", "says"),
    [
        (LAYER, 1.0, "keep=1 of 4 experts keeps all of them: nothing would change"),
        (LAYER, 0.25, "is 1, and each token needs 2"),
        (LAYER.replace("renormalize=true", 'score="sigmoid"'), 0.5, "scores are sigmoid, whose"),
        (
            LAYER.replace("moe.route(logits#)", "moe.route(logits#, c#)").replace(
                "  logits#:",
                "  c#: f32[4] = aten.sum.dim_IntList(layers.#.router) <dim=(1)>\n  logits#:",
            ),
            0.5,
            "corrects its scores, or chooses among groups",
        ),
        (
            LAYER.replace("aten.silu.default(g)", "aten.softmax.int(g) <dim=-1>"),
            0.5,
            "holds aten.softmax.int, which may mix its neurons",
        ),
    ],
    ids=["all", "fewer than k", "sigmoid", "correction", "softmax inside"],
)  # fmt: skip
def test_declines(layer, keep, says):
    assert says in declined(program(1, layer), MergeExperts(keep=keep))


def test_what_enters_an_expert_may_scale_what_leaves_it():
    gated = "aten.linear.default(h, b2)\n      y: f32[R, 8] = aten.mul.Tensor(z, bx)"
    layer = LAYER.replace("y: f32[R, 8] = aten.linear.default(h, b2)", f"z: f32[R, 8] = {gated}")
    assert change(program(1, layer), HALF)[-1].damage.applied


BODY = LAYER[LAYER.index("      g: f32") : LAYER.index("      return y")]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("      y: f32[R, 8] = aten.silu.default(bx)\n", "no hidden neurons that could be aligned"),
        (
            BODY.replace("g: f32[R, 6] = aten.linear.default(bx, b1)",
                         "c: f32[R, 6] = aten.slice.Tensor(bx) <dim=-1, start=0, end=6>\n"
                         "      g: f32[R, 6] = aten.linear.default(bx, b1)"),
            "holds aten.slice.Tensor",
        ),
        (
            "      g: f32[R, 6] = aten.linear.default(bx, b1)\n"
            "      z: f32[R, 8] = aten.linear.default(g, b2)\n"
            "      u: f32[R, 6] = aten.linear.default(z, b3)\n"
            "      n: f32[1, 8] = aten.linear.default(u, b2)\n"
            "      y: f32[R, 8] = aten.mul.Tensor(n, g)\n",
            "to what enters it",
        ),
    ],
    ids=["no neurons", "a slice", "added across"],
)  # fmt: skip
def test_bodies_whose_neurons_have_an_order_are_declined(body, says):
    (op,) = [o for o in graph(1, LAYER.replace(BODY, body)).ops if o.name == "moe.experts"]
    with pytest.raises(NoMatch) as raised:
        neuron_axes(op.body)
    assert says in str(raised.value)


def test_a_layer_in_float64() -> None:
    model, x = Moe(), torch.randn(80, WIDTH, dtype=torch.float64)
    for i, linear in enumerate(model.experts):
        model.experts[i] = nn.Sequential(linear, nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    compiled = moec.compile(
        model.double(), (x,), passes="+merge-experts(keep=0.5)", calib={"x": x}, build=False
    )
    (damage,) = compiled.report().damage
    assert damage.bytes_after < damage.bytes_before
