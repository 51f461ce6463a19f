"""Experts that give constants as a move of moec optimize, beside eager models with constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.nn.functional import linear

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.passes.approximate.choices.model_choices import ModelChoices, read_choices, write_choices
from tests.zoo.two_layers import EXPERTS, WIDTH, Experts, K

EXPERT = 4 * (WIDTH * WIDTH + WIDTH)
ROUTER = 4 * EXPERTS * WIDTH
TOTAL = 2 * (ROUTER + EXPERTS * EXPERT)
TABLE = 8 * (EXPERTS + 1)
LESS = EXPERT - 4 * WIDTH - TABLE
"""What a layer saves in which one expert gives a constant."""
X = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))
ARGS = (X[:5],)
CALIB = {"x": X}


class WithBias(Experts):
    def __init__(self) -> None:
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(EXPERTS, WIDTH))

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.w[e], self.b[e])


class Net(torch.nn.Module):
    """Two layers. In the second one expert 2 gives a large constant, if it is planted."""

    def __init__(self, planted: bool = True) -> None:
        super().__init__()
        self.first, self.second = WithBias(), WithBias()
        if planted:
            with torch.no_grad():
                self.second.w[2], self.second.b[2] = 0, 10 * torch.randn(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def net(planted: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(planted)


def chosen(model: Net, **options: Any) -> ModelChoices:
    limits = choice_limits(*(options.pop(name, None) for name in ("memory", "token_bytes", "loss")))
    return search(model, ARGS, calib=CALIB, **options).choices(limits)


@pytest.fixture(scope="module")
def planted() -> ModelChoices:
    return chosen(net(), memory=TOTAL - LESS, moves=("prune", "constant"))


def test_an_expert_of_constant_results_becomes_its_constant(planted: ModelChoices) -> None:
    """Its contributions are the largest, and without it tokens would go to other experts."""
    ((name, layer),) = planted.layers.items()
    assert (name, layer.experts, layer.constant) == ("second", (0, 1, 3), True)
    assert layer.share > 0.3
    assert planted.damage < 1e-10
    assert planted.bytes == TOTAL - LESS
    pruned = chosen(net(), memory=TOTAL - LESS, moves=("prune",))
    assert pruned.damage > 0.01


def constants(layer: Experts, x: torch.Tensor) -> torch.Tensor:
    """[E, D]: of all vectors those with the smallest squared error in the result of `layer`."""
    weights, chosen = layer.gate(x).softmax(-1).topk(K)
    means = []
    for e in range(EXPERTS):
        squares = (weights * (chosen == e)).sum(-1, keepdim=True).square()
        results = linear(x, layer.w[e], layer.b[e])
        means.append((squares * results).sum(0) / squares.sum().clamp(min=1e-30))
    return torch.stack(means)


def replaced(layer: Experts, left: tuple[int, ...]) -> Experts:
    means = constants(layer, X)
    with torch.no_grad():
        for e in set(range(EXPERTS)) - set(left):
            layer.w[e], layer.b[e] = 0, means[e]
    return layer


def test_a_file_and_its_data_give_the_model_with_constants(
    planted: ModelChoices, tmp_path: Path
) -> None:
    write_choices(planted, path := tmp_path / "a.yaml")
    assert read_choices(path) == planted
    model = moec.compile(net(), ARGS, choices=path, calib=CALIB)
    torch.testing.assert_close(model(X), net()(X).detach(), rtol=1e-4, atol=1e-4)
    assert [block.zero for block in model.blocks] == ["", "1 constant"]
    assert {block.router for block in model.blocks} == {"softmax, top-2"}
    assert "second: 3 of 4 experts, constants for the others, 2 of 2 for each" in str(
        model.report()
    )
    with pytest.raises(UsageError, match="the choices have constants, means of experts' results"):
        moec.compile(net(), ARGS, choices=path)


def test_half_of_the_experts_and_formats() -> None:
    """Compiled, and beside an eager model with constants and weights of 8 bits."""
    options = {"memory": 31_000, "moves": ("formats", "constant"), "formats": ("int8",)}
    choices = chosen(net(False), **dict(options))
    assert {choice.format for choice in choices.products.values()} == {"int8"}
    assert [len(layer.experts) for layer in choices.layers.values()] == [2]
    model = moec.optimize(net(False), ARGS, calib=CALIB, **options)
    right = net(False)
    for name, layer in choices.layers.items():
        replaced(getattr(right, name), layer.experts)
    y = torch.as_tensor(np.asarray(model(X)))
    assert (y - right(X)).norm() < 0.02 * right(X).norm()
    assert (y - net(False)(X)).norm() > 0.2 * right(X).norm()
    assert model.report().damage == ()


@pytest.mark.parametrize("fewer", ["top-k", "threshold"])
def test_a_token_reads_the_experts_that_are_left(fewer: str) -> None:
    """Of its experts those that are no constants, and are among its best or not skipped."""
    searched = search(net(), ARGS, calib=CALIB, moves=("constant", fewer))
    settings = [s for s in searched.layers["second"] if s.constant]
    assert {(len(s.experts), s.top_k, s.threshold > 0) for s in settings} >= (
        {(3, 2, False), (2, 1, False)} if fewer == "top-k" else {(3, 2, False), (2, 2, True)}
    )
    weights, ids = net().second.gate(X).softmax(-1).topk(K)
    for setting in settings:
        read = torch.isin(ids, torch.tensor(setting.experts))
        read &= weights >= setting.threshold * weights[:, :1]
        mean = read[:, : setting.top_k].float().sum(-1).mean()
        assert setting.experts_read == pytest.approx(float(mean), abs=1e-3)


def test_bytes_of_a_token(planted: ModelChoices) -> None:
    """Two experts of the first layer, of the second those that it chooses on average; and all
    biases, routers, constants and numbers."""
    mean = planted.layers["second"].mean_k
    weights = 4 * WIDTH * WIDTH * (K + mean)
    assert planted.token_bytes == pytest.approx(
        2 * ROUTER + 4 * WIDTH * (2 * EXPERTS - 1) + weights + 4 * WIDTH + TABLE, abs=1
    )


def test_it_is_chosen_for_a_limit_of_a_token(planted: ModelChoices) -> None:
    choices = chosen(
        net(), token_bytes=planted.token_bytes + 1, moves=("prune", "constant", "top-k")
    )
    assert choices.layers == planted.layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merged": ((0, 2), (1,), (3,))}, "experts are merged or constant: leave out merged and"),
        ({"experts": (0, 1, 7)}, r"no router of top 2 chooses 2 of experts \(0, 1, 7\)"),
        ({"experts": (), "top_k": 0}, "the model has no such layer"),
    ],
)
def test_other_choices_are_refused(
    planted: ModelChoices, changes: dict[str, Any], message: str
) -> None:
    layer = msgspec.structs.replace(planted.layers["second"], **changes)
    other = msgspec.structs.replace(planted, layers={"second": layer})
    with pytest.raises(UsageError, match=f"choices: second: {message}"):
        moec.compile(net(), ARGS, choices=other, calib=CALIB)


def test_formats_of_experts_are_another_move(planted: ModelChoices) -> None:
    with pytest.raises(UsageError, match="expert-formats and constant: fewer experts change"):
        search(net(), ARGS, calib=CALIB, moves=("constant", "expert-formats"))
    product = msgspec.structs.replace(planted.products["second"], experts={"int8": (1,)})
    product = msgspec.structs.replace(product, format="int4:32")
    other = msgspec.structs.replace(planted, products={**planted.products, "second": product})
    with pytest.raises(UsageError, match="a layer drops, merges or replaces some, which changes"):
        moec.compile(net(), ARGS, choices=other, calib=CALIB)
