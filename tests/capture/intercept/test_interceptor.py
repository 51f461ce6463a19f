"""One table and one pass: what is replaced while a module is traced, and that all of it returns."""

from __future__ import annotations

import builtins
import math
from math import sqrt

import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.capture.intercept.interceptor import Handler, intercepted
from moec.capture.intercept.table import traced_handlers


class Rooted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * sqrt(x.shape[0])


def test_a_function_is_replaced_under_each_name_and_returns() -> None:
    handlers = [Handler(math, "sqrt", "root"), Handler(builtins, "int", "integer")]
    plain = math.sqrt
    with intercepted(Rooted(), handlers):
        assert (math.sqrt, sqrt, globals()["int"]) == ("root", "root", "integer")
        assert builtins.int("3") == 3
    assert (math.sqrt, sqrt) == (plain, plain)
    assert "int" not in globals()


def test_a_capture_replaces_few_functions() -> None:
    before = {handler.name: getattr(handler.owner, handler.name) for handler in traced_handlers()}
    assert len(before) <= 20
    capture(Rooted(), (torch.randn(5, 4),))
    after = {handler.name: getattr(handler.owner, handler.name) for handler in traced_handlers()}
    assert after == before
