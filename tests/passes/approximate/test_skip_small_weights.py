"""Small routing weights that are skipped, beside a model that is written so."""

from __future__ import annotations

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Stage
from moec.ir.interpret.verifier import verify
from moec.passes.approximate.skip_small_weights import skip_small_weights
from tests.passes.changed import LAYER, layers_of, outputs, program, tokens

CAPACITY = LAYER.replace(
    "  rows#:",
    '  c#: i64[B*S, 2] = moe.capacity(i#) <num_experts=4, capacity=9, order="token"> @ layers.#\n'
    "  rows#:",
).replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, c#)")


def expected(weights: dict[str, torch.Tensor], ids: torch.Tensor, threshold: float, how: str):
    """The scores of `program` in plain torch, where a small weight counts as none."""
    x = weights["embed"][ids].flatten(0, 1)
    for i in range(2):
        router, w1, w3, w2 = (
            weights[f"layers.{i}.{name}"] for name in ("router", "w1", "w3", "w2")
        )
        w, chosen = (x @ router.mT).softmax(-1).topk(2)
        w = w / w.sum(-1, keepdim=True) if how == "renormalize" else w
        total = w.sum(-1, keepdim=True)
        w = torch.where(w < threshold * w[:, :1], 0, w)
        w = w / w.sum(-1, keepdim=True) * total if how == "renormalize" else w
        y = torch.zeros_like(x)
        for e in range(4):
            hidden = torch.nn.functional.silu(x @ w1[e].mT) * (x @ w3[e].mT)
            y = y + (w * (chosen == e)).sum(-1, keepdim=True) * (hidden @ w2[e].mT)
        x = x + y
    return (x @ weights["embed"].mT).reshape(*ids.shape, -1)


@pytest.mark.parametrize("how", ["renormalize", "plain"])
@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_it_is_a_model_without_small_weights(how: str, threshold: float) -> None:
    layer = LAYER if how == "renormalize" else LAYER.replace("k=2, renormalize=true", "k=2")
    original = changed = program(2, layer)
    for block in layers_of(original):
        changed = skip_small_weights(changed, block, threshold)
    verify(changed.graph, Stage.MOE)
    ids = tokens(64)
    (scores,) = outputs(changed, ids)
    right = expected(dict(original.weights), ids, threshold, how)
    torch.testing.assert_close(scores, right, rtol=1e-4, atol=1e-4)
    assert (scores - outputs(original, ids)[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LAYER.replace("renormalize=true", 'score="none"'), "weights are its logits, and may be"),
        (CAPACITY, "drops choices beyond a capacity"),
    ],
)
def test_reasons(layer: str, message: str) -> None:
    original = program(1, layer)
    with pytest.raises(NoMatch, match=message):
        skip_small_weights(original, layers_of(original)[0], 0.5)
