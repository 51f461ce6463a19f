"""The replacements of int, float and len: as Python's for plain values, symbolic for sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from moec.capture.intercept.substitutes import SHADOWS, Integer, Real, integer_of, python_type


@pytest.mark.parametrize(
    ("value", "options"), [("12", {"base": 16}), (2.9, {}), (True, {}), (torch.tensor(3.5), {})]
)
def test_integers_are_those_of_python(value: Any, options: dict[str, int]) -> None:
    assert Integer(value, **options) == int(value, **options)


def test_types_compare_as_those_of_python() -> None:
    assert isinstance(3, Integer)
    assert not isinstance(3, Real)
    assert isinstance(3.0, Real)
    assert not isinstance(3.0, Integer)
    assert [Integer, Real] == [int, float]
    assert [Real, Integer] != [int, float]
    assert issubclass(bool, Integer)
    assert (Integer(), Real(), Real("2.5"), Real(torch.tensor(2.5))) == (0, 0.0, 2.5, 2.5)
    assert (python_type(Integer), python_type(Real), python_type(str)) == (int, float, str)


def test_lengths_and_extremes_of_plain_values() -> None:
    assert SHADOWS["len"]([1, 2]) == 2
    with pytest.raises(TypeError, match="0-d tensor"):
        SHADOWS["len"](torch.tensor(1))
    assert SHADOWS["max"]([], default=4) == 4
    assert SHADOWS["min"]("cab") == "a"


def test_sizes_stay_symbolic() -> None:
    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            size = x.shape[0]
            real = Real(size)
            assert isinstance(size, Integer)
            assert isinstance(real, Real)
            assert integer_of(real) is size
            first = torch.arange(size) < Integer(real * 0.5)
            return first[:, None] + x + SHADOWS["min"](size, 4)

    exported = export(Sized(), (torch.zeros(8, 2),), dynamic_shapes=({0: Dim("n", min=2, max=64)},))
    result = exported.module()(torch.zeros(14, 2))
    assert result[:, 0].tolist() == [5.0] * 7 + [4.0] * 7
