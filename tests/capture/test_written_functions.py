"""Functions written out in others, on the numbers where the plain formula fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moec
from moec.capture.decomposition.kernels import (
    ELEMENTWISE,
    MOST,
    bilinear,
    conv_transpose,
    logcumsumexp,
    of_complex,
    of_real,
    to_real,
)
from moec.errors import UnsupportedError
from tests.capture.test_written_out import Function

HARD = [0.0, -0.0, 1e-30, -1e-5, 0.3, -0.999, 1.0, 1.0000001, -7.5, 3e9, -1e25, math.inf, -math.inf,
        math.nan]  # fmt: skip


@pytest.mark.parametrize("op", ELEMENTWISE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_single_numbers_are_eagers(op: Any, dtype: torch.dtype) -> None:
    """At 0, -0, 1, huge and infinite numbers and NaN; of two operands all pairs."""
    x = torch.tensor(HARD, dtype=torch.float64).to(dtype)
    if str(op) == "aten.exp2.default":
        x = x.clamp(-100, 100)
    operands = [x] if len(op._schema.arguments) == 1 else [x[:, None], x[None]]
    y, eager = ELEMENTWISE[op](*operands), op(*operands)
    rtol = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y, eager, equal_nan=True, rtol=rtol, atol=0)
    if y.dtype == dtype and str(op) not in ("aten.fmax.default", "aten.fmin.default"):
        assert ((y == 0) & (torch.signbit(y) != torch.signbit(eager))).sum() == 0


SIZES = st.integers(1, 7)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    axes=st.sampled_from([(0,), (2,), (1, 2), (2, 0), (0, 1, 2)]),
    norm=st.sampled_from(["backward", "ortho", "forward"]),
    size=st.integers(1, 9),
)
def test_transforms_are_eagers(
    sizes: tuple[int, ...], axes: tuple[int, ...], norm: str, size: int
) -> None:
    """In each order of axes, with even and odd sizes, and other sizes than the frequencies'."""
    x = torch.randn(sizes, dtype=torch.float64)
    scale = {"backward": 0, "ortho": 1, "forward": 2}[norm]
    half = torch.fft.rfftn(x, dim=axes, norm=norm)
    torch.testing.assert_close(of_real(x, axes, scale, True), half)
    full = torch.fft.fftn(x, dim=axes, norm=norm)
    torch.testing.assert_close(of_real(x, axes, scale, False), full)
    torch.testing.assert_close(of_complex(x.to(full.dtype), axes, scale, True), full)
    back = {0: 2, 1: 1, 2: 0}[scale]
    torch.testing.assert_close(of_complex(full, axes, back, False).real, x)
    last = torch.fft.rfft(x, size, dim=axes[-1])
    y = to_real(last, axes[-1:], back, size)
    torch.testing.assert_close(y, torch.fft.irfft(last, size, dim=axes[-1], norm=norm))


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    more=st.integers(0, 2),
    batched=st.booleans(),
)
def test_transposed_convolutions_are_eagers(
    groups: int, kernel: int, stride: int, padding: int, dilation: int, more: int, batched: bool
) -> None:
    more = min(more, max(stride, dilation) - 1)
    x, bias = torch.randn(2, 4, 6), torch.randn(3 * groups)
    x = x if batched else x[0]
    weight = torch.randn(4, 3, kernel)
    options = (bias, [stride], [padding], [more], groups, [dilation])
    if (6 - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1 < 1:
        return
    eager = F.conv_transpose1d(x, weight, *options)
    torch.testing.assert_close(conv_transpose(x, weight, *options), eager)


def test_running_sums_and_bilinear_products_are_eagers() -> None:
    """Prefixes of -inf, values far apart, no element, no axis."""
    x = torch.tensor([[-math.inf, -math.inf, 3.0, 400.0, -400.0], [500.0, 1.0, math.nan, 2.0, 3.0]])
    for rows, dim in ((x, 1), (x, 0), (x[:, :0], 1), (x[0, 3], 0)):
        torch.testing.assert_close(logcumsumexp(rows, dim), rows.logcumsumexp(dim), equal_nan=True)
    a, b, weight, bias = (torch.randn(s) for s in ((2, 3, 4), (2, 3, 5), (6, 4, 5), (6,)))
    torch.testing.assert_close(bilinear(a, b, weight, bias), F.bilinear(a, b, weight, bias))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "long": (lambda x: torch.fft.fft(x.repeat(1, MOST)).real, r"_fft_\w+\.default has no kernel"),
    "limits": (lambda x: x.histc(8), "histc.* no kernel for limits that are those of the data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_refused(name: str) -> None:
    function, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words):
        moec.compile(Function(function).eval(), (torch.randn(3, 4),))
