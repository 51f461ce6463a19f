"""Formats that suit a limit of memory or of quality."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.loss import Loss, parse_loss
from moec.optimise.optimisation.sensitivity import StoredProduct
from moec.optimise.optimisation.solve import solve
from moec.passes.approximate.choices.model_choices import ProductChoice
from moec.passes.core.damage import Distance
from tests.zoo.two_layers import EXPERTS, WIDTH, Net


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


CALIB = {"x": torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))}
WEIGHTS = EXPERTS * WIDTH * WIDTH  # of a layer
REST = 2 * 4 * EXPERTS * WIDTH  # bytes of the routers


def optimized(net: Net, **options: object) -> moec.CompiledModel:
    return moec.optimize(net, (torch.randn(5, WIDTH),), calib=CALIB, **options)


def formats_of(model: moec.CompiledModel) -> dict[str, str]:
    return {line.name: line.format for line in model.quantised}


def notes_of(model: moec.CompiledModel) -> str:
    return "\n".join(model.report().notes)


def test_the_layer_that_matters_gets_more_bits(net):
    room = REST + WEIGHTS * 9 // 16 + WEIGHTS * 17 // 16  # int4:32 and int8 with their scales
    model = optimized(net, memory=room, formats=("int8", "int4:32"))
    assert formats_of(model) == {"first": "int4:32", "second": "int8"}
    assert "chose 1 int4:32, 1 int8" in notes_of(model) or "chose 1 int8, 1 int4:32" in notes_of(
        model
    )


def test_predicted_and_measured_damage_agree(net):
    """The squared errors of these two layers add up."""
    model = optimized(net, memory=REST + 3 * WEIGHTS)
    match = re.search(r"squared error (\S+) measured, (\S+) predicted", notes_of(model))
    assert match
    measured, predicted = map(float, match.groups())
    assert 0.5 < measured / predicted < 2


def test_a_loss_has_the_fewest_bytes(net):
    """int4 of the second layer alone is an error of about .1, of the first one .001."""
    loose = optimized(net, loss="error<=0.2", formats=("int8", "int4:32"))
    assert formats_of(loose) == {"first": "int4:32", "second": "int4:32"}
    tight = optimized(net, loss="error<=0.02", formats=("int8", "int4:32"))
    assert formats_of(tight) == {"first": "int4:32", "second": "int8"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "optimize needs a limit: give memory, token_bytes, tokens_per_second, loss, or several",
        ),
        ({"memory": "1MiB", "quant": "int8"}, "optimize chooses formats itself: leave quant out"),
        (
            {"memory": 9000},
            r"in the smallest formats, .* of which no format changes: allow more, name",
        ),
        ({"memory": "1GiB"}, "the limit allows the weights as they are: use moec compile"),
        (
            {"loss": "error<=0.01", "memory": 24_000},
            r"takes about 28\.\d kB of weights, and the limit is memory 24\.0 kB, where the best "
            r"choice has error 0\.08\d*: allow more loss, or more memory",
        ),
        ({"loss": "error<=1e-7"}, "no format of any product is within it"),
        ({"loss": "kl<=0.1"}, "kl needs a causal language model, which this model is not"),
        ({"token_bytes": "500kB"}, "token_bytes is '500kB': give bytes, or a size with GiB"),
        ({"loss": "kl<0.1"}, "write kl<=0.02, perplexity<="),
        ({"loss": "kl<=+1%"}, "write kl<=0.02, perplexity<="),
        ({"loss": "perplexity<=+1"}, r"write a relative limit as perplexity<=\+1%"),
        ({"memory": 10**5, "formats": ("int7",)}, "'int7' is not a format"),
    ],
)
def test_refusals(net, options, message):
    with pytest.raises(UsageError, match=message):
        optimized(net, **options)


def test_losses():
    before = Distance(0.0, 0.0, kl=0.0, perplexity=10.0)
    relative = parse_loss("perplexity<=+5%")
    assert relative == Loss("perplexity", 0.05, relative=True)
    assert relative.allowed(before) == pytest.approx(10.5)
    assert str(relative) == "loss perplexity<=+5%"
    assert parse_loss("perplexity <= 12").allowed(before) == 12
    assert parse_loss("kl<=1e-2").damage(0.01, before) == 0.01
    assert parse_loss("error<=0.1").damage(0.1, Distance(0.0, 0.0)) == pytest.approx(0.01)


OPTIONS = st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 10)), max_size=3).map(
    lambda pairs: (
        ProductChoice(1, 1, "unchanged", 2000, 2000, 0.0),
        *(ProductChoice(1, 1, "int8", size, 2000, damage) for size, damage in pairs),
    )
)
PRODUCTS = st.lists(OPTIONS, min_size=1, max_size=4).map(
    lambda each: [StoredProduct(f"p{n}", options) for n, options in enumerate(each)]
)


@settings(deadline=None)
@given(PRODUCTS, st.integers(0, 8000))
def test_the_solver_finds_the_optimum(products, room):
    every = itertools.product(*(product.options for product in products))
    fitting = [c for c in every if sum(option.bytes for option in c) <= room]
    pick = solve(products, {}, "damage", bytes=room)
    if not fitting:
        assert pick is None
        return
    assert pick is not None
    assert pick.bytes <= room
    best = min(sum(option.damage for option in c) for c in fitting)
    assert pick.damage <= best * (1 + 1e-3) + 1e-6


@settings(deadline=None)
@given(PRODUCTS, st.floats(0, 20))
def test_the_solver_stays_within_a_loss(products, limit):
    pick = solve(products, {}, "bytes", damage=limit)
    assert pick is not None
    assert pick.damage <= limit * (1 + 1e-6) + 1e-5
    every = itertools.product(*(product.options for product in products))
    fitting = (c for c in every if sum(option.damage for option in c) <= limit)
    assert pick.bytes <= min(sum(option.bytes for option in c) for c in fitting) * (1 + 1e-3)
