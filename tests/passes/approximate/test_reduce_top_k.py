"""A smaller top-k: the results of a model whose routers have that k."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Stage
from moec.ir.interpret.verifier import verify
from moec.passes.approximate.choices.choose_experts import change_experts, reduce_top_k
from moec.passes.approximate.choices.model_choices import LayerChoice
from tests.passes.changed import LAYER, layers_of, outputs, program, tokens

TOP_1 = (
    LAYER.replace("k=2", "k=1").replace(", 2]", ", 1]").replace("2*B*S", "B*S").replace("[2*", "[")
)
CASTS = LAYER.replace(
    "  rows#:",
    "  c#: i32[B*S, 2] = aten._to_copy.default(i#) <dtype=i32> @ layers.#\n"
    "  d#: i64[B*S, 2] = aten._to_copy.default(c#) <dtype=i64> @ layers.#\n  rows#:",
).replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, d#)")


@pytest.mark.parametrize("layer", [LAYER, CASTS, LAYER.replace("renormalize=true", "scale=2.0")])
def test_it_is_a_router_with_that_k(layer: str) -> None:
    original = program(2, layer)
    changed = original
    for block in layers_of(original):
        changed = reduce_top_k(changed, block, 1)
    verify(changed.graph, Stage.MOE)
    routing = "scale=2.0" if "scale" in layer else "renormalize=true"
    expected = program(2, TOP_1.replace("renormalize=true", routing))
    for seed in range(3):
        ids = tokens(64, seed)
        torch.testing.assert_close(outputs(changed, ids), outputs(expected, ids), rtol=0, atol=0)


def test_fewer_experts_and_a_smaller_k() -> None:
    """As with one move after the other."""
    original = program(1)
    both = change_experts(original, "layers.0", LayerChoice((0, 2, 3), 4, 1, 2))
    pruned = change_experts(original, "layers.0", LayerChoice((0, 2, 3), 4, 2, 2))
    (layer,) = layers_of(pruned)
    assert layer.count == 3
    ids = tokens(64)
    torch.testing.assert_close(
        outputs(both, ids), outputs(reduce_top_k(pruned, layer, 1), ids), rtol=0, atol=0
    )
    verify(both.graph, Stage.MOE)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LAYER.replace("renormalize=true", 'score="sparsemixer", jitter=0.01'), "samples two exp"),
        (
            LAYER.replace("order#, w#)", "order#, v#)").replace(
                "  y#:", "  v#: f32[B*S, 2] = aten.relu.default(w#) @ layers.#\n  y#:"
            ),
            "aten.relu.default reads the router's choices or weights",
        ),
    ],
)
def test_reasons(layer: str, message: str) -> None:
    original = program(1, layer)
    with pytest.raises(NoMatch, match=message):
        reduce_top_k(original, layers_of(original)[0], 1)


def test_weights_that_are_an_output() -> None:
    original = program(1)
    weights = layers_of(original)[0].route.outputs[0]
    graph = replace(original.graph, outputs=(*original.graph.outputs, weights))
    with pytest.raises(NoMatch, match="are an output of the model"):
        reduce_top_k(replace(original, graph=graph), layers_of(original)[0], 1)
