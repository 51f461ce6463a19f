"""Texts of sizes: they may decide what is computed, so the size is that of the example."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import CaptureError


class Compared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if f"{x.shape[0]}" != "24" else x


class Measured(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(str(x.shape[0]))


class Looked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * {"rows 7": 2.0}.get("rows {}".format(x.shape[0]), 3.0)  # noqa: UP032


class Shape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(f"{x.shape}")


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * repr(x.shape[0] / 2).count("0")


def checked_scale(rows: str) -> float:
    return 0.5 if rows == "24" else 1.0


class Checked(nn.Module):
    """A function that is named as a check, but whose result is used."""

    def forward(self, x: Tensor) -> Tensor:
        return x * checked_scale(f"{x.shape[0]}")


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * math.log(len(f"{x.shape[0]}") + 1)


@pytest.mark.parametrize("kind", [Compared, Measured, Looked, Shape, Half, Checked, Logarithm])
def test_a_text_that_decides_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"test_size_text\.py:\d+ in forward: return x \*"):
        moec.compile(kind().eval(), (torch.randn(7, 8),), build=False, verify=False)


def check_rows(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        assert n >= 0, f"{n} rows"
        check_rows(n >= 0, f"{n} rows")
        logging.getLogger("moec.test").debug(f"{n} rows of {x.shape}")
        warnings.warn(
            f"{n} rows",
            stacklevel=2,
        )
        if n < 0:
            raise ValueError(f"{n} rows")
        with torch.profiler.record_function(f"{n} rows"):
            return x * 2


def test_texts_that_are_written_keep_sizes_open() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = moec.compile(Written().eval(), (torch.randn(7, 8),), build=False, verify=False)
    assert [str(dim) for dim in compiled.graph.inputs[0].shape] == ["T", "8"]
