"""Generic ops against eager torch: many in one module, at sizes 0, 1 and more, NaN included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.capture import capture
from moec.codegen.package import build
from moec.ir.graph import Module, Program
from moec.runtime.call.executor import Executor
from moec.runtime.package import Function as Signature
from moec.target.cpu import host

NAN, INF = float("nan"), float("inf")
Function = Callable[[Tensor, Tensor, Tensor], Any]

# x, y: floats [T, 8] with NaN, infinities, zeros and ties; i: int64 [T, 8] from -4 to 8.
GROUPS: dict[str, dict[str, Function]] = {
    "arithmetic": {
        "add": lambda x, y, i: x + y,
        "add number": lambda x, y, i: x + 0.1,
        "float to int": lambda x, y, i: i + x,
        "alpha": lambda x, y, i: torch.add(x, y, alpha=3),
        "reversed": lambda x, y, i: 2 - x,
        "times nothing": lambda x, y, i: x * 0.0,
        "times the least float": lambda x, y, i: (1 - (x > 0) * 1.0) * torch.finfo(x.dtype).min,
        "divide": lambda x, y, i: x / y,
        "divide ints": lambda x, y, i: i / 3,
        "floor ints": lambda x, y, i: i // 3,
        "floor ints by a negative": lambda x, y, i: i // -3,
        "floor": lambda x, y, i: torch.div(x, y, rounding_mode="floor"),
        "trunc": lambda x, y, i: torch.div(x, y, rounding_mode="trunc"),
        "remainder": lambda x, y, i: x % y,
        "remainder of ints": lambda x, y, i: i % -3,
        "fmod": lambda x, y, i: torch.fmod(i, 3),
        "square": lambda x, y, i: x**2,
        "power": lambda x, y, i: x.abs() ** 1.7,
        "power of ints": lambda x, y, i: i**5,
        "shift": lambda x, y, i: (i << 2) >> 1,
        "bits": lambda x, y, i: (i & 3) | (~i ^ 5),
        "bools add": lambda x, y, i: (x > 0) + (y > 0),
        "bool times float": lambda x, y, i: (x > 0) * y,
    },
    "comparison": {
        "equal": lambda x, y, i: x == y,
        "unequal": lambda x, y, i: x != y,
        "not less": lambda x, y, i: ~(x < y),
        "int with float": lambda x, y, i: i >= x,
        "int above half": lambda x, y, i: i > 0.5,
        "truth": lambda x, y, i: torch.logical_and(x, i),
        "maximum": lambda x, y, i: torch.maximum(x, y),
        "clamp": lambda x, y, i: x.clamp(-0.5, 0.5),
        "clamp between": lambda x, y, i: torch.clamp(x, y, y + 1),
        "where": lambda x, y, i: torch.where(x > 0, i, y),
        "a choice times": lambda x, y, i: torch.where(x > 0, x + 1, y) * (y + 1),
        "a remainder times": lambda x, y, i: ((x + 1) % y) * (y + 1),
        "masked": lambda x, y, i: x.masked_fill(x > 0, -INF),
        "is nan": lambda x, y, i: x.isnan() | x.isinf(),
    },
    "functions": {
        "exp": lambda x, y, i: (x * 30).exp(),
        "expm1": lambda x, y, i: x.expm1(),
        "log": lambda x, y, i: x.log(),
        "log1p": lambda x, y, i: x.abs().log1p(),
        "rsqrt": lambda x, y, i: x.abs().rsqrt(),
        "sin": lambda x, y, i: (x * 100).sin() + (x * 100).cos(),
        "tanh": lambda x, y, i: x.tanh(),
        "erf": lambda x, y, i: x.erf(),
        "sigmoid": lambda x, y, i: x.sigmoid(),
        "exp of ints": lambda x, y, i: i.exp(),
        "silu": lambda x, y, i: F.silu(x),
        "gelu": lambda x, y, i: F.gelu(x.clamp(-9, 9)),
        "gelu by tanh": lambda x, y, i: F.gelu(x.clamp(-9, 9), approximate="tanh"),
        "softplus": lambda x, y, i: F.softplus(x * 10),
        "relu": lambda x, y, i: F.relu(x),
        "elu": lambda x, y, i: F.elu(x),
        "round": lambda x, y, i: (x * 4).round() + (x * 3).floor() + (x * 3).ceil(),
        "sign": lambda x, y, i: x.sign() - x.abs(),
        "to int": lambda x, y, i: (x.nan_to_num(0, 9, -9) * 5).long(),
        "to narrow ints": lambda x, y, i: (i * 100).to(torch.int8),
        "to half": lambda x, y, i: x.half(),
        "to bfloat16": lambda x, y, i: x.bfloat16(),
        "to double": lambda x, y, i: x.double().exp(),
    },
    "shapes": {
        "view of nothing": lambda x, y, i: x[:, :0].contiguous().view(0, 1, len(x)),
        "view": lambda x, y, i: (x * 2).view(-1, 4, 2).transpose(1, 2).reshape(-1, 8),
        "permute": lambda x, y, i: x.view(-1, 2, 4).permute(1, 2, 0) * 2,
        "expand": lambda x, y, i: x[:, None, :].expand(-1, 3, -1) + 1,
        "slices": lambda x, y, i: x[:, 1:7:2] * x[:, -3:],
        "select": lambda x, y, i: x[:, 3] + x[:, -1],
        "cat": lambda x, y, i: torch.cat([x, y * 2, x + 1], -1),
        "cat rows": lambda x, y, i: torch.cat([x, y], 0) * 2,
        "stack": lambda x, y, i: torch.stack([x, y], -1) * 2,
        "rotate": lambda x, y, i: x * y + torch.cat([-x[:, 4:], x[:, :4]], -1) * y,
        "split": lambda x, y, i: x.split([3, 5], -1)[1],
        "flip": lambda x, y, i: x.flip(0) + x.flip(1),
        "roll": lambda x, y, i: x.roll(1, 1),
        "repeat": lambda x, y, i: x.repeat(2, 3),
        "pad": lambda x, y, i: F.pad(x, (1, 2), value=3.0),
        "pad rows": lambda x, y, i: F.pad(x, (0, 0, 2, 1)),
        "triangle": lambda x, y, i: x.tril() + x.triu(1),
        "windows": lambda x, y, i: x.unfold(1, 3, 2),
        "diagonal": lambda x, y, i: x.view(-1, 2, 4).diagonal(0, 1, 2),
        "arange": lambda x, y, i: torch.arange(x.shape[0]) * 2,
        "float arange": lambda x, y, i: torch.arange(0, 1, 0.1),
        "full": lambda x, y, i: torch.full_like(x, 0.3),
        "one hot": lambda x, y, i: F.one_hot(i[:, 0].clamp(0, 4), 5),
        "mask": lambda x, y, i: (
            torch.arange(x.shape[0])[None, :] <= torch.arange(x.shape[0])[:, None]
        ),
        "complex": lambda x, y, i: torch.view_as_real(
            torch.view_as_complex(x.float().view(-1, 4, 2))
            * torch.polar(torch.ones_like(y[:, :4].float()), y[:, :4].float().clamp(-9, 9))
        ),
    },
    "reductions": {
        "sum": lambda x, y, i: x.nan_to_num(0, 0, 0).sum(),
        "sum rows": lambda x, y, i: x.nan_to_num(0, 0, 0).sum(0),
        "sum ints": lambda x, y, i: i.sum(1) + (x > 0).sum(1),
        "mean": lambda x, y, i: x.mean(-1, keepdim=True),
        "extremes": lambda x, y, i: x.amax(-1) - x.amin(-1),
        "any": lambda x, y, i: (x > 1).any(-1) & (x > 1).any(),
        "all": lambda x, y, i: x.all(1),
        "argmax": lambda x, y, i: x.argmax(-1) * 100 + x.argmin(-1),
        "max": lambda x, y, i: x.max(1),
        "min": lambda x, y, i: x.min(1),
        "variance": lambda x, y, i: x.clamp(-9, 9).var(1),
        "norm": lambda x, y, i: x.norm(dim=1),
        "logsumexp": lambda x, y, i: x.logsumexp(1),
        "softmax": lambda x, y, i: x.softmax(-1),
        "softmax of nothing": lambda x, y, i: x.masked_fill(torch.arange(8) >= 0, -INF).softmax(-1),
        "log softmax": lambda x, y, i: x.log_softmax(-1),
        "layer norm": lambda x, y, i: F.layer_norm(x, (8,), y.new_full((8,), 2), y.new_ones(8)),
        "cumsum": lambda x, y, i: x.cumsum(1),
        "cumsum of rows": lambda x, y, i: i.cumsum(0),
        "cumulative maximum": lambda x, y, i: x.cummax(1),
        "sort": lambda x, y, i: torch.sort(x, dim=-1, stable=True),
        "sort falling": lambda x, y, i: torch.sort(x, dim=-1, descending=True, stable=True),
        "sort four": lambda x, y, i: torch.sort(y[:, :4], dim=-1, descending=True, stable=True),
        "sort rows": lambda x, y, i: torch.sort(x, dim=0, stable=True),
        "order": lambda x, y, i: torch.argsort(i, dim=-1, stable=True),
    },
    "lookups": {
        "embedding": lambda x, y, i: F.embedding(i.clamp(0, 3), torch.arange(12.0).view(4, 3)),
        "gather": lambda x, y, i: x.gather(1, i.clamp(0, 7)),
        "index": lambda x, y, i: x.t()[i[:, 0].clamp(0, 7)],
        "index from the end": lambda x, y, i: x[:, torch.tensor([-1, 0, 2])],
        "index both": lambda x, y, i: x[torch.arange(x.shape[0]), i[:, 0].clamp(0, 7)],
        "index two": lambda x, y, i: x.view(-1, 2, 4)[
            :, torch.tensor([1, 0]), torch.tensor([3, 2])
        ],
        "select": lambda x, y, i: x.index_select(1, torch.tensor([7, 0])),
        "scatter": lambda x, y, i: x.scatter(1, i.clamp(0, 7), 9.0),
        "scatter add": lambda x, y, i: x.scatter_add(1, i.clamp(0, 7), y),
        "put": lambda x, y, i: x.index_put((torch.arange(x.shape[0]), i[:, 0] % 8), y[:, 0]),
        "add at": lambda x, y, i: x.index_add(1, torch.tensor([1, 1]), y[:, :2]),
        "copy at": lambda x, y, i: x.index_copy(1, torch.tensor([1, 3]), y[:, :2]),
        "slice scatter": lambda x, y, i: torch.slice_scatter(x, y[:, :2], 1, 2, 6, 2),
        "select scatter": lambda x, y, i: torch.select_scatter(x, y[:, 0], 1, 2),
        "histogram": lambda x, y, i: torch.histc(i.float(), bins=5, min=0, max=4),
    },
    "products": {
        "mm": lambda x, y, i: finite(x) @ finite(y).t(),
        "mm of the transpose": lambda x, y, i: finite(x).t() @ finite(y),
        "bmm": lambda x, y, i: finite(x).view(-1, 2, 4) @ finite(y).view(-1, 4, 2),
        "outer": lambda x, y, i: torch.bmm(finite(x)[:, :, None], finite(y)[:, None, :]),
        "ints": lambda x, y, i: i.t() @ i,
        "addmm": lambda x, y, i: torch.addmm(
            finite(x)[:, :1], finite(x), finite(y).t(), beta=2, alpha=3
        ),
        "baddbmm": lambda x, y, i: torch.baddbmm(
            finite(x).view(-1, 2, 4)[:, :, :1],
            finite(x).view(-1, 2, 4),
            finite(y).view(-1, 4, 2),
        ),
        "linear": lambda x, y, i: F.linear(
            finite(x), torch.arange(24.0).view(3, 8).to(x.dtype) / 10, x.new_ones(3)
        ),
        "linear by a result": lambda x, y, i: F.linear(finite(x), finite(y)),
        "convolution": lambda x, y, i: F.conv1d(
            finite(x)[:, None], torch.arange(6.0).to(x.dtype).view(2, 1, 3) / 9, stride=2, padding=1
        ),
    },
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.5, 2, -2)


class Many(torch.nn.Module):
    def __init__(self, functions: list[Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, y: Tensor, i: Tensor) -> tuple[Any, ...]:
        return tuple(function(x, y, i) for function in self.functions)


def inputs(rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(rows)
    x, y = torch.randn(rows, 8).to(dtype), torch.randn(rows, 8).to(dtype)
    i = torch.randint(-4, 9, (rows, 8))
    if rows > 4:
        x[0, 0], x[1, 1], x[2, 2] = NAN, INF, -INF
        x[3] = torch.tensor([1, 1, 1, 2, 2, 2, 1, 1])
        y[3] = x[3]
        x[4], y[4, 0] = 0, 0
    return {"x": x, "y": y, "i": i}


def program(group: str, dtype: str) -> Program:
    """All functions of a group, for any number of rows."""
    rows = {0: torch.export.Dim("T")}
    module = Many(list(GROUPS[group].values()))
    example = tuple(inputs(6, DTYPES[dtype]).values())
    return capture(module, example, dynamic_shapes={"x": rows, "y": rows, "i": rows}).program


def check(
    group: str, dtype: str, rows: int, main: Signature, run: Callable[[Any], Mapping[str, Any]]
) -> None:
    """What a compiled group gives equals torch."""
    arguments = inputs(rows, DTYPES[dtype])
    if rows < min(low for low, _ in main.sizes.values()):
        pytest.skip("torch.export allows no fewer rows")
    result = iter(run({port.name: arguments[port.name] for port in main.inputs}).values())
    for name, function in GROUPS[group].items():
        expected = function(*arguments.values())
        for part in expected if isinstance(expected, tuple) else (expected,):
            value = next(result)
            assert value.dtype == part.dtype, name
            # float32: sums in another order and functions to 2 ulp; bf16: one rounding apart.
            exact = dtype == "f32" and part.dtype not in (torch.float16, torch.bfloat16)
            near = {"rtol": 2e-5, "atol": 2e-6} if exact else {"rtol": 1.6e-2, "atol": 1e-2}
            torch.testing.assert_close(
                value,
                part.contiguous(),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
                **near,
            )


@cache
def compiled(group: str, dtype: str) -> Executor:
    return Executor(build(Module.of(program(group, dtype)), host()))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # the variance of no rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 40])
def test_equals_torch(group: str, dtype: str, rows: int) -> None:
    run = compiled(group, dtype)
    check(group, dtype, rows, run.package.main, run)
