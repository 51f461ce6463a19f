"""Constants in place of experts, beside a model in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Program, Stage
from moec.ir.interpret.verifier import verify
from moec.ir.text import print_graph
from moec.passes.approximate.choices.choose_experts import change_experts
from moec.passes.approximate.choices.constant_experts import expert_constants, replace_by_constants
from moec.passes.approximate.choices.model_choices import LayerChoice
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from tests.passes.approximate.test_skip_small_weights import CAPACITY
from tests.passes.changed import LAYER, layers_of, outputs, program, tokens

Golden = Callable[[str], None]
LEFT = (0, 3)
GROUPS = LAYER.replace("renormalize=true", "groups=2, top_groups=1")


def rows(original: Program, ids: torch.Tensor, k: int, renormalise: bool):
    """The experts' input, the router's weights [T, E] (0: not chosen), and all results."""
    x = original.weights["embed"][ids].flatten(0, 1)
    names = ("router", "w1", "w3", "w2")
    router, w1, w3, w2 = (original.weights[f"layers.0.{name}"] for name in names)
    scores = (x @ router.mT).softmax(-1)
    w, chosen = scores.topk(k)
    w = w / w.sum(-1, keepdim=True) if renormalise else w
    weights = torch.zeros_like(scores).scatter(1, chosen, w)
    results = [torch.nn.functional.silu(x @ w1[e].mT) * (x @ w3[e].mT) @ w2[e].mT for e in range(4)]
    return x, weights, torch.stack(results)


def expected(original: Program, ids: torch.Tensor, k: int, threshold: float, renormalise: bool):
    """The scores where experts 1 and 2 give their means over `tokens()`, by squared weights."""
    _, weights, results = rows(original, tokens(), 2, renormalise)
    means = torch.einsum("te,etd->ed", weights**2, results) / (weights**2).sum(0)[:, None]
    x, weights, results = rows(original, ids, k, renormalise)
    weights = torch.where(weights < threshold * weights.amax(-1, keepdim=True), 0, weights)
    results = results.clone()
    for e in {0, 1, 2, 3} - {*LEFT}:
        results[e] = means[e]
    y = x + torch.einsum("te,etd->td", weights, results)
    return (y @ original.weights["embed"].mT).reshape(*ids.shape, -1)


def constants_on(original: Program, ids: torch.Tensor):
    evaluator = Evaluator(original, load_calibration({"ids": ids}, original, {}))
    layers = layers_of(original)
    (stats,) = evaluator.layer_stats(original, layers)
    return expert_constants(original, layers[0], stats, range(4))


@pytest.mark.parametrize(
    ("layer", "k", "threshold"),
    [(LAYER, 2, 0.0), (LAYER, 1, 0.0), (LAYER.replace(", renormalize=true", ""), 2, 0.7)],
    ids=["experts", "and a smaller k", "and a threshold"],
)
def test_it_is_a_model_with_means(layer: str, k: int, threshold: float) -> None:
    original, ids = program(1, layer), tokens(64, 1)
    constants = {"layers.0": constants_on(original, tokens()).vectors}
    choice = LayerChoice(LEFT, 4, k, 2, constant=True, threshold=threshold)
    changed = change_experts(original, "layers.0", choice, constants)
    verify(changed.graph, Stage.MOE)
    right = expected(original, ids, k, threshold, "renormalize" in layer)
    torch.testing.assert_close(outputs(changed, ids)[0], right, rtol=1e-4, atol=1e-4)
    assert changed.weights["layers.0.w1_2"].shape == (2, 6, 8)


def test_groups_of_a_router_stay() -> None:
    """Both experts of the second group give constants, which pruning could not drop."""
    original, ids = program(1, GROUPS), tokens(64, 1)
    (block,) = layers_of(original)
    changed = replace_by_constants(original, block, (0, 1), torch.zeros(4, 8))
    silent = dict(original.weights)
    silent["layers.0.w2"] = silent["layers.0.w2"].clone()
    silent["layers.0.w2"][2:] = 0
    torch.testing.assert_close(
        outputs(changed, ids), outputs(Program(original.graph, silent), ids), rtol=1e-6, atol=1e-6
    )
    assert "moe.zero_experts" not in {op.name for op in changed.graph.ops}


def test_text(golden: Golden) -> None:
    original = program(1)
    (block,) = layers_of(original)
    golden(print_graph(replace_by_constants(original, block, LEFT, torch.ones(4, 8)).graph))


def test_errors_are_those_of_the_results() -> None:
    """Of each expert alone; one that no token chooses has none, and gives zero."""
    original, ids = program(1), torch.arange(4).repeat(4)[None]
    constants = constants_on(original, ids)
    _, weights, results = rows(original, ids, 2, True)
    used = (weights > 0).any(0)
    assert not used.all()
    wrong = (results - constants.vectors[:, None]).square().sum(-1) * weights.mT**2
    torch.testing.assert_close(
        constants.errors[used], wrong.double().sum(1)[used], rtol=1e-4, atol=0
    )
    assert not constants.errors[~used].any()
    assert not constants.vectors[~used].any()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (CAPACITY, "drops choices beyond a capacity"),
        (
            LAYER.replace("order#, w#)", "order#)").replace("weighted=true", "weighted=false"),
            "the outputs of the experts are not weighted",
        ),
    ],
)
def test_reasons(layer: str, message: str) -> None:
    original = program(1, layer)
    with pytest.raises(NoMatch, match=message):
        replace_by_constants(original, layers_of(original)[0], LEFT, torch.ones(4, 8))
