"""Mixture-of-Supernets: the mixture of a chosen architecture becomes one dense layer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import moec
from docs.systems import Source
from tests.systems.records import Keep, load, record_of

system = load("22_mixture_of_supernets")
ARCHITECTURE = (32, 64)
SOURCE = Source(
    number=22,
    title="Mixture-of-Supernets",
    paper="2306.04845",
    example="22_mixture_of_supernets",
    process="encoder",
    modalities=("image",),
    adds="The weights of experts are mixed before the product, and no token is dispatched. Once "
    "the architecture is chosen, `fold-supernet` leaves the dense network of its size.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-4  # float32 sums in another order


@functools.cache
def folded(mixture: Any) -> tuple[Any, moec.CompiledModel]:
    torch.manual_seed(0)
    model = system.Supernet(system.SMALL, mixture).eval()
    return model, system.fold(model, ARCHITECTURE)


@pytest.mark.parametrize("mixture", [system.LayerWise, system.NeuronWise])
def test_a_mixture_folds_to_a_dense_layer_of_its_size(mixture: Any) -> None:
    model, dense = folded(mixture)
    size, graph = system.SMALL, dense.graph
    assert [value.name for value in graph.inputs] == ["x"]
    assert not [op for op in graph.ops if ".router" in op.origin]
    shapes = {p.name: p.shape for p in graph.params}
    linears = [op for op in graph.ops if op.name == "aten.linear.default"]
    mixed = [op for op in linears if op.origin.endswith((".up", ".down"))]
    assert [shapes[op.inputs[1].name] for op in mixed] == [(32, 32), (32, 32), (64, 32), (32, 64)]
    assert len(linears) == 2 + 4 * size.layers  # embedding, head; and of each layer four
    x = torch.randn(5, size.tokens, size.features)
    with torch.no_grad():
        eager = model(x, system.numbers(size, ARCHITECTURE))
    torch.testing.assert_close(dense(x), eager, rtol=TOLERANCE, atol=TOLERANCE)


def test_other_numbers_would_mix_otherwise() -> None:
    """The folded weight depends on the architecture: the router is not constant."""
    model, dense = folded(system.LayerWise)
    description = system.numbers(system.SMALL, ARCHITECTURE)
    x = torch.randn(3, system.SMALL.tokens, system.SMALL.features)
    with torch.no_grad():
        assert not torch.allclose(dense(x), model(x, 4 * description - 2), rtol=1e-2)


def test_sub_networks_learn_and_one_is_found() -> None:
    torch.manual_seed(0)
    model = system.Supernet(system.SMALL, system.LayerWise)
    losses = system.train(model, steps=60)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    architecture = system.search(model, most=128)
    assert sum(architecture) <= 128
    assert system.accuracy(model, architecture) > 0.5  # by chance 0.1


def test_record(keep: Keep) -> None:
    missing = ("no block: weights are mixed, not tokens dispatched; the mixture is folded",)
    keep(record_of(folded(system.LayerWise)[1], SOURCE, f"{TOLERANCE:g}", (), missing))
