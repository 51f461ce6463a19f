"""Compiled blocks see every change of their weights, and keep what is packed of them apart."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

import moec
from moec.dynamo.operators import PACKED
from tests.dynamo.modules import Listed, Masked
from tests.dynamo.test_inference import CLOSE, compiled


def test_changed_inference_tensors_are_seen() -> None:
    """They have no version: nothing is packed."""
    with torch.inference_mode():
        model = Masked()
        run = compiled(model)
        x = torch.randn(2, 5, 16)
        for _ in range(2):
            torch.testing.assert_close(run(x), model(x), **CLOSE)
            model.down.mul_(2)
            model.router.weight.neg_()
    stats = moec.stats()
    assert (stats.blocks, stats.packs) == (1, 0)


class Tempered(Listed):
    """A trained number scales the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x) * self.temperature
        weights, chosen = logits.softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            y = y + expert(x) * torch.where(chosen == index, weights, 0).sum(-1, keepdim=True)
        return y


def test_a_number_among_the_weights_may_change() -> None:
    model, x = Tempered(), torch.randn(5, 16)
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(x), model(x), **CLOSE)
            model.temperature.mul_(-0.5)
    assert moec.stats().blocks == 1


def test_graphs_of_one_layer_share_its_packed_weights() -> None:
    model = Listed().eval()
    run = compiled(model)
    x = torch.randn(5, 16)
    with torch.no_grad():
        run(x)
        torch.testing.assert_close(run(x[:1]), model(x[:1]), **CLOSE)  # Dynamo sets 1 apart
        model.router.weight.mul_(-1)
        for rows in (x, x[:1]):
            torch.testing.assert_close(run(rows), model(rows), **CLOSE)
    stats = moec.stats()
    assert (stats.compilations, stats.packs) == (2, 2)


def test_layers_that_share_a_graph_have_their_packed_weights_each() -> None:
    """Dynamo gives layers that are compiled one by one a single graph. What is packed for a layer
    is dropped with it, except for the latest."""
    layers, x = [Masked().eval() for _ in range(3)], torch.randn(5, 16)
    earlier = set(PACKED)
    for layer in layers:
        layer.compile(backend="moec", options={"rest": "eager", "strict": True})
    with torch.no_grad():
        for packs in (3, 3, 4):
            if packs == 4:
                layers[1].down.mul_(2)
            for layer in layers:
                torch.testing.assert_close(layer(x), layer.forward(x), **CLOSE)
            assert moec.stats().packs == packs
    assert moec.stats().compilations == 1
    assert len(set(PACKED) - earlier) == 3
    del layers[:2], layer
    gc.collect()
    assert len(set(PACKED) - earlier) == 1
