"""Pieces of a cat that are narrower than the position at which another piece is split."""

from __future__ import annotations

import pytest
import torch

from moec.capture import capture
from moec.codegen.package import build
from moec.ir.graph import Module
from moec.runtime.call.executor import Executor
from moec.target.cpu import host


class Turned(torch.nn.Module):
    """A partial rotary embedding before attention: 16 of 16 + `rest` features are turned."""

    def __init__(self, rest: int) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        heads = x.view(*x.shape[:2], 4, 16 + self.rest).transpose(1, 2)
        first, rest = heads[..., :16], heads[..., 16:]
        turned = torch.cat([-first[..., 8:], first[..., :8]], -1)
        joined = torch.cat([first * y.cos() + turned * y.sin(), rest], -1)
        return torch.nn.functional.scaled_dot_product_attention(joined, joined, joined)


@pytest.mark.parametrize("rest", [0, 2])
def test_a_narrow_piece_stays_in_its_place(rest: int) -> None:
    torch.manual_seed(0)
    module, args = Turned(rest), (torch.randn(2, 5, 4 * (16 + rest)), torch.randn(5, 16))
    captured = capture(module, args)
    run = Executor(build(Module.of(captured.program), host()))
    (actual,) = run({"x": args[0], "y": args[1]}).values()
    torch.testing.assert_close(actual, module(*args))
