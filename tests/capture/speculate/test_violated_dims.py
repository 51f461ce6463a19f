"""Dims that the user gave and an export cannot have: one sentence, not torch's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from moec.capture import capture
from moec.errors import CaptureError
from tests.capture.modules import Function


def single(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] == 1 else x


def pairs(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1] // 2, 2, 8).sum(2)


def listed(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0] * x.shape[1])[None, :, None]


@pytest.mark.parametrize(
    ("function", "dim", "words"),
    [
        (single, Dim("S", min=0), r"gives S sizes at which .* requires S != 1; give S limits"),
        (pairs, Dim("S", min=0), r"requires .*S // 2.*; give S limits"),
        (listed, Dim("S"), r"lets S vary, and the module fixes it at 12; leave S out"),
        (single, Dim("S", min=0, max=8), r"example has a size of 12, and .* allows 0 to 8; give"),
    ],
)
def test_a_dim_that_no_export_can_have(
    function: Callable[[Tensor], Tensor], dim: Any, words: str
) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        capture(Function(function), (torch.randn(2, 12, 8),), dynamic_shapes=({1: dim},))
    assert "\n" not in str(caught.value)
    assert "TORCH_LOGS" not in str(caught.value)


def test_a_dim_from_0_is_what_the_export_has() -> None:
    captured = capture(
        Function(lambda x: x * 2), (torch.randn(2, 12, 8),), dynamic_shapes=({1: Dim("S", min=0)},)
    )
    assert captured.program.graph.bounds["S"].low == 0
