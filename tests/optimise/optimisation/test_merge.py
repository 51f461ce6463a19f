"""Merged experts as a move of moec optimize, beside eager models of fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.passes.approximate.choices.model_choices import ModelChoices, read_choices, write_choices
from moec.passes.approximate.training.recover_routers import router_weights
from moec.passes.quantise.fixed_formats import named_products

EXPERTS, WIDTH, HIDDEN = 4, 64, 64
EXPERT = 4 * 2 * WIDTH * HIDDEN
TOTAL = 2 * EXPERTS * (EXPERT + 4 * WIDTH)
SMALLER = TOTAL - EXPERT + EXPERTS * (EXPERTS - 1)  # the router's column stays, in three sums
X = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))
ARGS = (X[:5],)


class Experts(torch.nn.Module):
    """Each token goes to one expert. Logits are large, so that choices are clear."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        torch.nn.init.normal_(self.gate.weight)
        self.up = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e in range(EXPERTS):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            hidden = torch.nn.functional.linear(x, self.up[e]).relu()
            y = y + weight * torch.nn.functional.linear(hidden, self.down[e])
        return y


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def net(planted: bool) -> Net:
    """If `planted`, experts 0 and 2 of the second layer differ only in the order of neurons."""
    torch.manual_seed(0)
    model, order = Net(), torch.randperm(HIDDEN)
    if planted:
        with torch.no_grad():
            model.second.up[2] = model.second.up[0][order]
            model.second.down[2] = model.second.down[0][:, order]
    return model


def chosen(planted: bool, memory: int, *moves: str) -> ModelChoices:
    searched = search(net(planted), ARGS, calib={"x": X}, formats=("int8",), moves=moves)
    return searched.choices(choice_limits(memory, None, None))


@pytest.fixture(scope="module")
def merged() -> ModelChoices:
    return chosen(True, SMALLER, "prune", "merge")


def test_equal_experts_are_merged(merged: ModelChoices) -> None:
    """Without either of them, half of the tokens would go to another expert."""
    ((name, layer),) = merged.layers.items()
    assert (name, layer.experts, layer.merged) == ("second", (0, 1, 3), ((0, 2), (1,), (3,)))
    assert sum(layer.usage) == len(X)
    assert merged.damage < 0.01
    assert merged.bytes <= SMALLER


def test_different_experts_are_not_merged() -> None:
    half = chosen(False, TOTAL // 3, "formats", "merge")
    assert not half.layers
    assert {choice.format for choice in half.products.values()} == {"int8"}


def eager(model: Net, x: torch.Tensor) -> torch.Tensor:
    """The second layer with experts 0 and 2 as one, which has the probabilities of both."""
    share = model.second.gate(x).softmax(-1)
    mass = torch.stack([share[:, 0] + share[:, 2], share[:, 1], share[:, 3]], -1)
    chosen = torch.tensor([0, 1, 3])[mass.argmax(-1)]
    y = torch.zeros_like(x)
    for e in (0, 1, 3):
        hidden = torch.nn.functional.linear(x, model.second.up[e]).relu()
        part = torch.nn.functional.linear(hidden, model.second.down[e])
        y = y + part * (chosen == e)[:, None]
    return model.first(x) + y


def test_a_file_merges_without_data(merged: ModelChoices, tmp_path: Path) -> None:
    write_choices(merged, path := tmp_path / "a.yaml")
    assert read_choices(path) == merged
    model = moec.compile(net(True), ARGS, choices=path)
    expected = eager(net(True), X[:64]).detach()
    torch.testing.assert_close(model(X[:64]), expected, rtol=1e-4, atol=1e-5)
    assert "second: 3 merged from 4 experts, 1 of 1 for each token" in str(model.report())


def test_routers_of_merged_experts_are_not_quantised() -> None:
    """They are two linear layers: the logits, and the sums of their probabilities."""
    choices = chosen(True, TOTAL // 4, "formats", "merge")
    assert choices.layers.keys() == {"second"}
    model = moec.compile(net(True), ARGS, choices=choices, calib={"x": X}, build=False)
    graph = model.pass_results[-1].program.graph
    assert not named_products(graph)
    assert {value.name for value in router_weights(graph)} == {
        "first.gate.weight",
        "second.gate.weight",
    }
    assert {line.name for line in model.quantised} == {"first", "second"}


@pytest.mark.parametrize(
    "changes",
    [
        {"merged": ((0, 2), (1,))},
        {"merged": ((0, 2), (1, 2), (3,))},
        {"merged": ((0, 1), (2,), (3,))},
        {"usage": (1, 2, 3)},
        {"merged": ()},
    ],
)
def test_other_groups_are_refused(merged: ModelChoices, changes: dict[str, Any]) -> None:
    layer = msgspec.structs.replace(merged.layers["second"], **changes)
    other = msgspec.structs.replace(merged, layers={"second": layer})
    with pytest.raises(UsageError, match="second: merged and usage are those of 4 experts, each"):
        moec.compile(net(True), ARGS, choices=other)


def test_formats_of_experts_are_another_move() -> None:
    with pytest.raises(UsageError, match="expert-formats and merge: fewer experts change"):
        search(net(True), ARGS, calib={"x": X}, moves=("merge", "expert-formats"))
