"""Damage that gradients predict, beside the measured one, and where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.errors import UsageError
from moec.optimise.optimisation import row_gradients
from moec.optimise.optimisation.optimize import search
from tests.models.families import FAMILIES


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "switch_transformers"])
def test_predicted_damage_is_near_the_measured_one(name: str) -> None:
    """Of all products in the smallest formats together; 25 families were within 0.6 to 1.4."""
    family = FAMILIES[name].one_layer()
    text = {k: v for k, v in family.inputs(8, 16, seed=3).items() if k != "use_cache"}
    model, inputs = family.build(torch.bfloat16), family.inputs(2, 16)
    searched = search(model, (), inputs, calib=text, formats=("int8", "int4:32"))
    assert all(option.damage > 0 for p in searched.products for option in p.options[1:])
    pick = searched.solve("bytes")
    assert pick is not None
    distance = searched.measured(pick).distance
    measured = distance.error**2 if distance.kl is None else distance.kl
    assert 0.5 < pick.damage / measured < 2


class Scaled(torch.nn.Module):
    """A linear layer of one row without an axis of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.scale = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.vector = torch.nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(x) * self.scale(self.vector + x.sum(0))


def test_a_vector_is_one_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64)
    searched = search(Scaled(), (x,), calib={"x": x}, formats=("int8", "int4:32"))
    assert {p.name for p in searched.products} == {"more", "scale"}
    pick = searched.solve("bytes")
    assert pick is not None
    distance = searched.measured(pick).distance
    assert 0.3 < pick.damage / distance.error**2 < 3


def test_an_operator_without_a_derivative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_derivative(*arguments: Any) -> Any:
        raise RuntimeError("derivative for aten::copy is not implemented\nmore")

    monkeypatch.setattr(row_gradients, "copied", no_derivative)
    family = FAMILIES["deepseek_v3"].one_layer()
    model, inputs = family.build(), family.inputs(2, 16)
    with pytest.raises(UsageError, match="cannot be computed: derivative for aten::copy is"):
        search(model, (), inputs, calib={"input_ids": inputs["input_ids"]}, formats=("int8",))
