"""If torch differs from what the hooks expect, capture says so and continues without them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moec.capture import capture
from moec.capture.speculate import search
from moec.errors import CaptureError
from tests.capture.speculate.forms import counts_as_a_list
from tests.capture.speculate.layer import D, Layer

UNKNOWN = r"moec does not know torch .* \(.*\): modules that read data into Python"


def test_this_torch_is_known() -> None:
    assert search.describe_misfit() == ""
    assert search.describe_unknown_torch() == ""


def test_what_users_read_about_an_unknown_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "describe_misfit", lambda: "a branch on data is not seen")
    assert search.describe_unknown_torch() == (
        f"moec does not know torch {torch.__version__} (a branch on data is not seen): modules "
        "that read data into Python are captured only where torch.export takes them "
        "(tested: torch 2.13 to 2.15)"
    )


def test_an_unknown_torch_is_named_and_the_first_reason_stands() -> None:
    layer = Layer(counts_as_a_list).eval()
    search.hooks_fit.cache_clear()
    with (
        mock.patch.object(search, "trace", side_effect=AttributeError("evaluate_expr")),
        pytest.warns(UserWarning, match=UNKNOWN),
        pytest.raises(CaptureError, match=r"cannot be exported(.|\n)*forms\.py:\d+: `"),
    ):
        capture(layer, (torch.randn(2, 6, D),))
    search.hooks_fit.cache_clear()


def test_an_export_that_torch_takes_needs_no_hooks() -> None:
    search.hooks_fit.cache_clear()
    with mock.patch.object(search, "trace", side_effect=AttributeError("evaluate_expr")):
        capture(torch.nn.Linear(3, 4).eval(), (torch.randn(5, 3),))
