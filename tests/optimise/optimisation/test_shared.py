"""A layer's shared expert that is dropped, as a move of moec optimize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import moec
from moec.errors import UsageError
from moec.optimise.optimisation.optimize import choice_limits, search
from moec.passes.approximate.choices.model_choices import (
    LayerChoice,
    ModelChoices,
    read_choices,
    write_choices,
)
from tests.zoo.two_layers import Experts

WIDTH = 64
SHARED = 2 * 4 * WIDTH * WIDTH
X = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(1))
ARGS = (X[:5],)
CALIB = {"x": X}


class Shared(torch.nn.Module):
    """Experts and, by `kind`, a dense network beside them: of no result, of a constant one, or a
    usual one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.experts = Experts()
        self.up = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = torch.nn.Linear(WIDTH, WIDTH, bias=kind == "constant")
        if kind != "usual":
            torch.nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x) + self.down(torch.nn.functional.silu(self.up(x)))


class Net(torch.nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.first, self.second = Shared(first), Shared(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def net(first: str = "usual", second: str = "zero") -> Net:
    torch.manual_seed(0)
    return Net(first, second)


def total(model: torch.nn.Module) -> int:
    return sum(4 * weight.numel() for weight in model.parameters())


def chosen(model: Net, memory: int, *moves: str, **options: Any) -> ModelChoices:
    searched = search(model, ARGS, calib=CALIB, moves=moves, **options)
    return searched.choices(choice_limits(memory, None, None))


@pytest.mark.parametrize("kind", ["zero", "constant"])
def test_a_shared_expert_of_no_effect_is_dropped(kind: str, tmp_path: Path) -> None:
    """The other one stays, and the file gives the model that was chosen."""
    model, room = net("usual", kind), total(net("usual", kind)) - SHARED
    choices = chosen(model, room, "shared", "prune")
    ((name, layer),) = choices.layers.items()
    assert (name, layer.experts, layer.constant) == ("second#shared", (), kind != "zero")
    assert choices.damage < 1e-12
    assert choices.bytes == room
    assert choices.products.keys() == {"first.experts", "second.experts", "first.up", "first.down"}
    write_choices(choices, path := tmp_path / "a.yaml")
    assert read_choices(path) == choices
    compiled = moec.compile(model, ARGS, choices=path, calib=CALIB if layer.constant else None)
    torch.testing.assert_close(compiled(X), model(X).detach(), rtol=1e-4, atol=1e-4)
    assert f"{name}: no shared expert" in str(compiled.report())


def test_a_token_does_not_read_it() -> None:
    searched = search(net(), ARGS, calib=CALIB, moves=("shared",))
    before, after = (searched.token_bytes(name) for name in ("damage", "token_bytes"))
    assert before - after == 2 * SHARED - 4 * WIDTH
    choices = searched.choices(choice_limits(None, before - SHARED, None))
    assert choices.layers.keys() == {"second#shared"}
    assert choices.token_bytes == before - SHARED


def test_the_mean_of_a_usual_one_and_formats() -> None:
    """Compiled and as eager models without it, whose mean is added."""
    model = net("usual", "usual")
    options = {"memory": 46_000, "moves": ("formats", "shared")}
    choices = chosen(model, options["memory"], *options["moves"], formats=("int8",))
    ((name, layer),) = choices.layers.items()
    assert layer.constant
    compiled = moec.optimize(model, ARGS, calib=CALIB, formats=("int8",), **options)
    right, x = net("usual", "usual"), X
    for part in ("first", "second"):
        block = getattr(right, part)
        if name.startswith(part):
            hidden = torch.nn.functional.silu(block.up(x))
            mean = block.down(hidden).mean(0).detach()
            block.down = torch.nn.Linear(WIDTH, WIDTH)
            block.down.weight.data.zero_()
            block.down.bias.data.copy_(mean)
        x = (x + block(x)).detach()
    y = torch.as_tensor(compiled(X))
    assert (y - x).norm() < 0.02 * x.norm()
    assert (y - net("usual", "usual")(X)).norm() > 0.1 * x.norm()


def test_both_are_dropped_beside_constants() -> None:
    """Choices of a layer and of its shared expert, in either order."""
    model = net("zero", "zero")
    model.second.experts.w.data[3] = 0
    choices = chosen(model, total(model) - 2 * SHARED - SHARED // 4, "shared", "constant")
    names = ["first#shared", "second", "second#shared"]
    assert sorted(choices.layers) == names
    for order in (names, names[::-1]):
        layers = {name: choices.layers[name] for name in order}
        other = msgspec.structs.replace(choices, layers=layers)
        compiled = moec.compile(model, ARGS, choices=other, calib=CALIB)
        torch.testing.assert_close(compiled(X), model(X).detach(), rtol=1e-4, atol=1e-4)


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts(x)


def test_a_layer_without_one() -> None:
    torch.manual_seed(0)
    searched = search(Plain(), ARGS, calib=CALIB, moves=("shared",))
    assert searched.declined == (
        "1 x it has no shared expert: nothing dense of its input is added to its result",
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("first", {}, "the model has no such layer"),
        ("third#shared", {}, "the model has no such layer"),
        ("first#shared", {"of": 4}, "without a shared expert there are 0 of 1 experts"),
        ("first#shared", {"threshold": 0.5}, "without a shared expert there are 0 of 1"),
    ],
)
def test_other_choices_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    layer = msgspec.structs.replace(LayerChoice((), 1, 0, 1), **changes)
    other = ModelChoices("", 0, 0, "kl", 0.0, 0.0, "nearest", {}, {name: layer})
    with pytest.raises(UsageError, match=f"choices: {name}: {message}"):
        moec.compile(net(), ARGS, choices=other, build=False)
