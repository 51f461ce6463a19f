"""Greatest, least and sorted elements of all dtypes in ONNX Runtime, with infinities and NaN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.dtypes import FLOATS
from moec.ir.aten import TORCH_DTYPES
from tests.codegen.onnx.running import running

NAN, INF = math.nan, math.inf
ROWS = [
    [1.25, NAN, 1.5, 2, -1, 0.5, 1.25, 0.25],
    [NAN, 1.5, 2, INF, 0, -INF, 0.5, NAN],
    [INF, 3, NAN, -0.5, -INF, 1, INF, NAN],
    [NAN] * 8,
    [2, 1.25, 1, 1.25, 0, 1, 2, 1],
    [0.5, 0.25, 0.75, 0.5, -0.25, -0.75, 0.5, 0.25],
]
DTYPES = (*FLOATS, "i64", "i32", "u8")


class Ranked(nn.Module):
    """Casts its input, since NumPy, and so ONNX Runtime's interface, has no bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(self.dtype)
        results = (
            *torch.sort(x, dim=-1, stable=True),
            *torch.sort(x, dim=-1, descending=True, stable=True),
            *torch.sort(x, dim=0, stable=True),
            torch.argsort(x, dim=-1, stable=True),
            x.topk(3, dim=-1).values,
            x.topk(3, dim=0, largest=False).values,
            x.argmax(-1),
            x.argmin(0, keepdim=True),
            x.argmax(),
            *x.max(-1),
            *x.min(0, keepdim=True),
            x.amax(-1),
            x.amin((0, 1)),
            x.amin(0, keepdim=True),
            x.max(),
            x.min(),
        )
        return tuple(result.double() for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_are_those_of_torch(dtype: str, tmp_path: Path) -> None:
    """NaN is above infinity, equal elements keep their order, and fractions count."""
    x = torch.tensor(ROWS)
    if dtype not in FLOATS:
        x = (x.nan_to_num(3, 2, 0) * 4).abs()
    module = Ranked(TORCH_DTYPES[dtype])
    program = capture(module, (x,)).program
    results = running(program, tmp_path)({program.graph.inputs[0].name: x}).values()
    for number, (result, expected) in enumerate(zip(results, module(x), strict=True)):
        torch.testing.assert_close(
            result,
            expected,
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda text, number=number: f"result {number}: {text}",
        )
