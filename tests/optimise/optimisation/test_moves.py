"""Moves that change experts: fewer of them and a smaller top-k, in one search with formats."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.optimise.optimisation.sensitivity import StoredProduct
from moec.optimise.optimisation.solve import solve
from moec.passes.approximate.choices.model_choices import LayerChoice, ModelChoices, ProductChoice
from tests.zoo.two_layers import EXPERTS, WIDTH, K, Net

ROUTER = 4 * EXPERTS * WIDTH
STACK = 4 * EXPERTS * WIDTH * WIDTH
X = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def chosen(model: Net, **options: Any) -> ModelChoices:
    limits = choice_limits(*(options.pop(name, None) for name in ("memory", "token_bytes", "loss")))
    return search(model, (torch.randn(5, WIDTH),), calib={"x": X}, **options).choices(limits)


def formats_of(choices: ModelChoices) -> dict[str, str]:
    return {name: choice.format for name, choice in choices.products.items()}


def useless(model: Net) -> Net:
    """The router of the second layer never chooses expert 2."""
    model.second.gate = torch.nn.Linear(WIDTH, EXPERTS)
    with torch.no_grad():
        model.second.gate.bias[2] = -1e4
    return model


@pytest.mark.parametrize("moves", [("prune",), ("formats", "prune", "top-k")])
def test_a_useless_expert_is_pruned(moves: tuple[str, ...]) -> None:
    """Nothing else has to change, although that layer is the one that matters."""
    room = 2 * (ROUTER + STACK) - STACK // EXPERTS
    choices = chosen(useless(net()), memory=room, moves=moves)
    ((name, layer),) = choices.layers.items()
    assert (name, layer.experts, layer.share) == ("second", (0, 1, 3), 0)
    assert layer.damage < 1e-10
    assert set(formats_of(choices).values()) == {"unchanged"}
    assert choices.bytes <= room


def test_a_sensitive_product_stays_as_it_is() -> None:
    """One layer fits in four bytes a weight: the second one, which the result is made of."""
    choices = chosen(net(), memory=2 * ROUTER + STACK * 4 // 3, moves=("formats", "prune"))
    assert formats_of(choices)["second"] == "unchanged"
    assert formats_of(choices)["first"] != "unchanged"
    assert choices.layers.keys() <= {"first"}


def test_a_smaller_top_k_for_a_limit_of_a_token() -> None:
    """Each layer reads two of its four experts; the first one is the one to read less."""
    room = 2 * ROUTER + STACK * K // EXPERTS + STACK // EXPERTS
    choices = chosen(net(), token_bytes=room, moves=("top-k",))
    ((name, layer),) = choices.layers.items()
    assert (name, layer.top_k, layer.top_k_before) == ("first", 1, 2)
    assert layer.experts == tuple(range(EXPERTS))
    assert choices.token_bytes == room
    assert choices.bytes == 2 * (ROUTER + STACK)


def test_small_weights_are_skipped_for_a_limit_of_a_token() -> None:
    """In the first layer, which the result has little of; a token reads fewer experts on average,
    and the compiled model is an eager one without these weights."""
    room = 2 * ROUTER + STACK * K // EXPERTS + STACK * 8 // 5 // EXPERTS
    choices = chosen(net(), token_bytes=room, moves=("threshold",))
    ((name, layer),) = choices.layers.items()
    assert (name, layer.top_k, layer.experts) == ("first", K, tuple(range(EXPERTS)))
    model, first = net(), net().first
    weights, ids = first.gate(X).softmax(-1).topk(K)
    skipped = weights < layer.threshold * weights[:, :1]
    assert layer.mean_k == pytest.approx(K - float(skipped.sum() / len(X)), rel=1e-3)
    assert choices.token_bytes == pytest.approx(
        2 * ROUTER + (K + layer.mean_k) * STACK // EXPERTS, abs=1
    )
    y = 100 * model.second(X)
    for slot in range(K):
        weight = weights[:, slot].masked_fill(skipped[:, slot], 0)[:, None]
        y = y + weight * torch.einsum("tnk,tk->tn", first.w[ids[:, slot]], X)
    compiled = moec.compile(model, (X[:5],), choices=choices)
    torch.testing.assert_close(compiled(X), y.detach(), rtol=1e-3, atol=1e-3)
    notes = "\n".join(compiled.report().notes)
    assert f"2 of 2 for each token, {layer.mean_k:.3g} on average without weights under" in notes


def test_all_moves_together_are_compiled_and_measured() -> None:
    options = {"memory": 30_000, "token_bytes": 12_000, "moves": ("formats", "prune", "top-k")}
    choices = chosen(net(), **dict(options))
    assert choices.bytes <= 30_000
    assert choices.token_bytes <= 12_000
    model = moec.optimize(net(), (torch.randn(5, WIDTH),), calib={"x": X}, **options)
    notes = "\n".join(model.report().notes)
    match = re.search(r"squared error (\S+) measured, (\S+) predicted", notes)
    assert match
    assert float(match[1]) == pytest.approx(choices.damage, rel=0.01)
    y, right = model(X), net()(X).detach()
    damage = float(((torch.as_tensor(y) - right).norm() / right.norm()) ** 2)
    assert damage == pytest.approx(choices.damage, rel=0.05)
    for name, layer in choices.layers.items():
        assert f"{name}: {len(layer.experts)} of 4 experts, {layer.top_k} of 2" in notes


def test_experts_alone_are_compiled() -> None:
    model = moec.optimize(net(), (X[:5],), calib={"x": X}, loss="error<=0.05", moves=("prune",))
    notes = "\n".join(model.report().notes)
    assert "choose-experts: first: 2 of 4 experts, 2 of 2 for each token" in notes
    assert model.quantised == ()


def test_experts_within_a_loss() -> None:
    """The first layer is a hundredth of the result: with an error of 5 %, half of it may go."""
    choices = chosen(net(), loss="error<=0.05", moves=("prune", "top-k"))
    assert choices.layers.keys() == {"first"}
    assert choices.damage <= 0.05**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": 10**5, "moves": ("prun",)},
            "'prun' is no move: moves are formats, prune, merge, con",
        ),
        ({"token_bytes": 999, "moves": ("top-k",)}, "the limit of a token is 999 bytes, and the w"),
        ({"token_bytes": 10**6}, "the limit allows the weights as they are"),
        (
            {"loss": "error<=0.001", "token_bytes": 20_000, "moves": ("formats", "top-k")},
            "takes more, and the limit is 20.0 kB for a token, where the best choi",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(net(), **options)


def test_experts_of_a_file_are_applied() -> None:
    model = net()
    choices = chosen(model, token_bytes=2 * ROUTER + STACK * 3 // 4, moves=("prune", "top-k"))
    args = (torch.randn(5, WIDTH),)
    compiled = moec.compile(model, args, choices=choices)
    assert "choose-experts: first: 4 of 4 experts, 1 of 2" in "\n".join(compiled.report().notes)
    route = "first: no router of top 2 chooses"
    for changes, message in (
        ({"of": 8}, "first: the model has 4 experts there, 2 for each token: give those that moec"),
        ({"experts": (0, 0, 1)}, rf"{route} 1 of experts \(0, 0, 1\)"),
        ({"experts": (1,)}, rf"{route} 1 of experts \(1,\)"),
        ({"experts": (1, 4)}, rf"{route} 1 of experts \(1, 4\)"),
        ({"top_k": 3}, f"{route} 3 of experts"),
    ):
        layer = msgspec.structs.replace(choices.layers["first"], **changes)
        other = msgspec.structs.replace(choices, layers={"first": layer})
        with pytest.raises(UsageError, match=f"choices: {message}"):
            moec.compile(model, args, choices=other)
    other = msgspec.structs.replace(choices, layers={"third": choices.layers["first"]})
    with pytest.raises(UsageError, match="choices: third: the model has no such layer: give those"):
        moec.compile(model, args, choices=other)


SETTINGS = st.lists(
    st.tuples(st.integers(2, 4), st.integers(1, 2), st.floats(0, 10)), min_size=1, max_size=3
).map(
    lambda triples: (
        LayerChoice((0, 1, 2, 3), 4, 2, 2),
        *(LayerChoice(tuple(range(n)), 4, k, 2, (4 - n) * 500, damage) for n, k, damage in triples),
    )
)
OPTIONS = st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 10)), max_size=2).map(
    lambda pairs: (
        ProductChoice(1, 1, "unchanged", 2000, 2000, 0.0),
        *(ProductChoice(1, 1, "int8", size, 2000, damage) for size, damage in pairs),
    )
)


AS_IT_IS = (ProductChoice(1, 1, "unchanged", 2000, 2000, 0.0),)
HALF = (LayerChoice((0, 1, 2, 3), 4, 2, 2), LayerChoice((0, 1), 4, 2, 2, 1000, 1.0))


@hypothesis_settings(deadline=None)
@example(HALF, [AS_IT_IS, AS_IT_IS], 3000)
@given(SETTINGS, st.lists(OPTIONS, min_size=2, max_size=2), st.integers(500, 6000))
def test_bytes_depend_on_formats_and_experts(layer_settings, options, room) -> None:
    """The solver's optimum is that of all choices, one after the other."""
    products = [
        StoredProduct("a", options[0], "a"), StoredProduct("b", options[1])
    ]  # fmt: skip
    every = [
        (a.bytes * len(s.experts) / 4 + b.bytes, a.damage + b.damage + s.damage)
        for s in layer_settings
        for a in options[0]
        for b in options[1]
    ]
    fitting = [damage for size, damage in every if size <= room]
    pick = solve(products, {"a": layer_settings}, "damage", bytes=room)
    assert (pick is None) == (not fitting)
    if pick is not None:
        assert pick.damage <= min(fitting) * (1 + 1e-3) + 1e-6
        assert pick.bytes <= room
