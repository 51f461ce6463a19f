"""Sizes that ONNX computes as Python does, and those that it may round otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.codegen.onnx.lower import lower
from moec.codegen.onnx.profiles import PROFILES
from moec.errors import UnsupportedError
from moec.ir.text import parse
from tests.codegen.onnx.running import running

WRITTEN: Mapping[str, Callable[[int], Any]] = {
    "isqrt": lambda n: math.isqrt(n),
    "root": lambda n: int(math.sqrt(n) * 1.5),
    "greatest": lambda n: max(3, n // 3),
    "rounded": lambda n: min(n, round(n * 0.3) + 1),
    "below zero": lambda n: (n - 9) // 4 + (n // 2 - 5) // -3 + 40,
    "up, below zero": lambda n: -((9 - n) // 4) + 40,
}
REFUSED = {
    "floor(log(T))": r"size log\(T\) cannot be written: ONNX may round",
    "floor(36028797018963968*T/3602879701896397)": r"its numbers take more than 64 bits",
    "floor(f64(f64(T/3)*9/7))": r"more than one operation on doubles",
}


class Sized(nn.Module):
    """Every function as a number that is compared, and as a size."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        position = torch.arange(x.shape[0])
        counts = [function(x.shape[0]) for function in WRITTEN.values()]
        masked = [(position < count)[:, None] * x for count in counts]
        return (*masked, *(x.sum() + torch.zeros(count) for count in counts))


def test_sizes_are_those_of_python(tmp_path: Path) -> None:
    program = capture(Sized().eval(), (torch.randn(6, 2),)).program
    run = running(program, tmp_path)
    for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100):
        x = torch.randn(n, 2)
        results = list(run({"x": x}).values())
        torch.testing.assert_close(tuple(results), Sized()(x))


@pytest.mark.parametrize("size", REFUSED)
def test_a_size_that_onnx_may_round_differently_is_refused(size: str) -> None:
    graph = parse(f"""graph main(x: f32[T]) {{
  size T in [1, inf]
  y: f32[{size}] = aten.full.default() <size=({{{size}}},), fill_value=0.0>
  return y
}}
""")
    with pytest.raises(UnsupportedError, match=REFUSED[size]):
        lower(graph, PROFILES["portable"], 23, "rows")
