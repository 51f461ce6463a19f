"""Texts of sizes: they may decide what is computed, so the size is that of the example."""

from __future__ import annotations

import json
import logging
import math
import pprint
import warnings
from dataclasses import dataclass

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


class Printed(nn.Module):
    """The text is made in the standard library."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(pprint.pformat([x.shape[0]]))


@dataclass
class Rows:
    count: int


class OfDataclass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(repr(Rows(x.shape[0])))


class Json(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(json.dumps(f"{x.shape[0]}"))


class Percent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len("%s" % x.shape[0])  # noqa: UP031


class Tens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * round(x.shape[0], -1)


class Bits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (len(bin(x.shape[0])) + len(hex(x.shape[0])) + x.shape[0].bit_length())


TEXTS = (Compared, Measured, Looked, Shape, Half, Checked, Logarithm)
OF_LIBRARIES = (Printed, OfDataclass, Json, Percent, Tens, Bits)


@pytest.mark.parametrize("kind", [*TEXTS, *OF_LIBRARIES])
def test_a_text_that_decides_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match=r"test_texts\.py:\d+( in forward)?: `?return x \*"):
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
        logging.getLogger("moec.test").warning("%s rows, %r", n, x.shape)
        with torch.profiler.record_function(f"{n} rows"):
            return x * 2


def test_texts_that_are_written_keep_sizes_open() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = moec.compile(Written().eval(), (torch.randn(7, 8),), build=False, verify=False)
    assert [str(dim) for dim in compiled.graph.inputs[0].shape] == ["T", "8"]
