"""What no MoE module computes of sizes is refused, with one sentence and the user's line."""

from __future__ import annotations

import re

import pytest
import torch

from moec.capture import capture
from moec.errors import CaptureError
from tests.capture.modules import Function
from tests.capture.sized import UNSUPPORTED


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_no_expression_of_sizes_repeats_is_refused(name: str) -> None:
    function, words = UNSUPPORTED[name]
    with pytest.raises(CaptureError, match=words) as caught:
        capture(Function(function), (torch.randn(24, 8),))
    assert re.search(r"sized\.py:\d+", str(caught.value))
    assert len(str(caught.value).splitlines()) <= 6
