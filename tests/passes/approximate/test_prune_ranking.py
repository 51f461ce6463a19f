"""The experts that prune-experts keeps, by worth, per layer or over all layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.ir.graph import Program
from moec.ir.text import parse, print_graph
from moec.passes.approximate.prune_experts import PruneExperts, eliminate_experts, rank_experts
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator, LayerStats
from moec.passes.core.moe_layer import Layer
from tests.passes.changed import (
    LAYER,
    LIMITED,
    SCALED,
    change,
    declined,
    graph,
    layers_of,
    program,
    tokens,
)
from tests.passes.masked import kept_by, with_masks


def test_what_an_expert_is_worth():
    """Three tokens: expert 0 is chosen often and adds little, expert 3 once and much."""
    stats = LayerStats(
        torch.zeros(3, 8),
        torch.tensor([[0, 1], [0, 3], [0, 1]]),
        torch.full((3, 2), 0.5),
        torch.tensor([[1.0, 2.0], [1.0, 9.0], [1.0, 2.0]]),
        torch.zeros(3, 4),
    )
    original = program(1)
    (layer,) = layers_of(original)

    def kept(**options):
        pass_ = PruneExperts(**options)
        return pass_.experts_to_keep(layer, pass_.worth(original, layer, stats))

    assert stats.usage(4).tolist() == [3, 2, 0, 1]
    assert stats.saliency(4).tolist() == [1, 2, 0, 9]
    assert kept(by="usage") == [0, 1]
    assert kept(by="reap") == [1, 3]
    drawn = {tuple(kept(by="random", seed=s)) for s in range(20)}
    assert len(drawn) > 3
    assert drawn == {tuple(kept(by="random", seed=s)) for s in range(20)}


FORMS = {
    "renormalised": LAYER,
    "not renormalised": LAYER.replace(", renormalize=true", ", scale=2.5"),
    "not weighted": LAYER.replace("(out#, order#, w#)", "(out#, order#)").replace(
        ", weighted=true", ""
    ),
    "sigmoid, corrected": LAYER.replace("renormalize=true", 'score="sigmoid"').replace(
        "moe.route(logits#)", "moe.route(logits#, c#)"
    ).replace("  w#:", "  c#: f32[4] = aten.sum.dim_IntList(layers.#.router) <dim=(1)>\n  w#:"),
    "groups": LAYER.replace("renormalize=true", 'score="sigmoid", groups=2, top_groups=2'),
    "sparsemixer": LAYER.replace("renormalize=true", 'score="sparsemixer", jitter=0.1'),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_errors_are_those_of_masked_columns(form, monkeypatch):
    """The greedy order and its errors, from the layer's own output with columns masked in the
    graph; all experts once and products of theirs instead, in few rows at a time, as many."""
    original = program(1, FORMS[form])
    (layer,) = layers_of(original)
    data = load_calibration({"ids": tokens(64)}, original, {})
    evaluator = Evaluator(original, data)
    (stats,) = evaluator.layer_stats(original, [layer])
    monkeypatch.setattr(
        "moec.passes.approximate.prune_experts.HELD", 4 * 4 * 4 * 64
    )  # G of 64 rows
    worth = eliminate_experts(original, layer, stats)
    right, pruned = evaluator.rows_of(original, layer.output), []
    for _ in range(2):
        errors = {}
        for e in set(range(4)) - set(pruned):
            masked = with_masks(original, [sorted(set(range(4)) - {*pruned, e})], FORMS[form])
            (y,) = [v for v in masked.graph.values() if v.name == layer.output.name]
            errors[e] = float((evaluator.rows_of(masked, y) - right).norm() / right.norm())
        pruned.append(min(errors, key=errors.__getitem__))
        assert float(worth[pruned[-1]]) == pytest.approx(errors[pruned[-1]], rel=1e-5)
    assert worth.isinf().sum() == 2
    assert PruneExperts(by="error").worth(original, layer, stats).equal(worth)


def test_experts_that_nobody_chooses_go_first():
    """They cost nothing; of these equals the one with the higher number goes before the other."""
    original = program(1)
    (layer,) = layers_of(original)
    (stats,) = Evaluator(original, load_calibration({"ids": tokens()}, original, {})).layer_stats(
        original, [layer]
    )
    stats = replace(stats, logits=stats.logits * 0 + torch.tensor([-9.0, 2.0, -8.0, 2.0]))
    worth = eliminate_experts(original, layer, stats)
    assert worth.isinf().tolist() == [False, True, False, True]
    assert 0 == worth[2] < worth[0] < 1e-300


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            LIMITED,
            "drops choices beyond a capacity, which by=error does not model",
        ),
        (
            SCALED,
            "weights scale the inputs of the experts, and by=error needs a weighted sum of outputs",
        ),
        (
            LAYER.replace("(out#, order#, w#)", "(out#, order#, v#)").replace(
                "  rows#:", "  v#: f32[B*S, 2] = aten.mul.Tensor(w#) <other=2.0>\n  rows#:"
            ),
            "outputs of the experts are weighted by more than the router's weights",
        ),
    ],
    ids=["capacity", "scaled inputs", "other weights"],
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_errors_are_declined(layer, says, scope):
    assert says in declined(program(1, layer), PruneExperts(by="error", scope=scope))


def flat(count: int, value: float, **attrs: object) -> tuple[Layer, torch.Tensor]:
    """A layer of `count` experts that are worth `value`, and a little less each."""
    (layer,) = layers_of(program(1))
    dispatch = replace(layer.dispatch, attrs={"num_experts": count})
    route = replace(layer.route, attrs={**layer.route.attrs, **attrs})
    worth = value - torch.arange(count).double() / 100
    output = replace(layer.combine, outputs=(replace(layer.output),))
    return replace(layer, dispatch=dispatch, route=route, combine=output), worth


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        ([(4, 3.0, {}), (4, 1.0, {})], 0.75, [4, 2]),
        ([(4, 1.0, {}), (4, 1.0, {})], 0.75, [3, 3]),  # of equals those of the first layer
        ([(4, 1.0, {}), (8, 1.015, {})], 0.5, [2, 4]),
        ([(8, 3.0, {"groups": 2, "top_groups": 2}), (4, 2.0, {})], 0.67, [6, 2]),
        ([(4, 3.0, {}), (8, 2.0, {"groups": 2, "top_groups": 1})], 0.75, [4, 4]),  # one is left
    ],
)
def test_one_ranking_for_all_layers(layers, keep, expected):
    inputs = [flat(count, value, **attrs) for count, value, attrs in layers]
    plan = list(rank_experts(keep, inputs).values())
    assert [len(entry) if isinstance(entry, list) else entry for entry in plan] == [
        f"its 4 experts are among the best {round(keep * sum(c for c, _, _ in layers))} of all "
        f"{sum(c for c, _, _ in layers)}"
        if count == size
        else count
        for count, (size, _, _) in zip(expected, layers, strict=True)
    ]


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (1.0, "keep=1 of all 8 experts is all of them: nothing would change"),
        (0.4, "keep=0.4 of all 8 experts is 3, and their routers need 4"),
    ],
)
def test_a_share_of_all_that_cannot_be(keep, says):
    reasons = declined(program(), PruneExperts(keep=keep, scope="global"))
    assert reasons == f"{says}; {says}"


def test_a_layer_that_cannot_be_ranked_is_left_out():
    """Of the others' experts the share stays."""
    limited = "  j1: i64[B*S, 2] = moe.capacity(i1) <num_experts=4, capacity=3>\n  rows1:"
    text = print_graph(graph()).replace("  rows1:", limited).replace("(x0, i1)", "(x0, j1)")
    step = change(Program(parse(text), program().weights), PruneExperts(by="error", scope="global"))
    assert [len(entry) for entry in kept_by(step[-1])] == [2]
    assert ["capacity" in d.reason for d in step[-1].declined] == [True]


def test_norms_are_those_of_what_an_expert_adds():
    original = program(1)
    (layer,) = layers_of(original)
    data = load_calibration({"ids": tokens(32)}, original, {})
    (stats,) = Evaluator(original, data).layer_stats(original, [layer])
    w1, w3, w2 = (original.weights[f"layers.0.{name}"] for name in ("w1", "w3", "w2"))
    for token in (0, 17):
        for slot in range(2):
            e, x = int(stats.experts[token, slot]), stats.x[token]
            y = w2[e] @ (torch.nn.functional.silu(w1[e] @ x) * (w3[e] @ x))
            torch.testing.assert_close(
                stats.norms[token, slot], y.norm() * stats.weights[token, slot]
            )
