"""Operators without kernels, written out in others: numbers of eager at sizes other than the
example's, and what stays refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.capture import capture
from moec.capture.decomposition.kernels import embedding_bag, kthvalue, median, scatter_reduce
from moec.capture.decomposition.pooling import avg_pool, max_pool2d
from moec.codegen.loops.emit import EMIT
from moec.errors import CaptureError, UnsupportedError
from moec.ir.interpret.evaluate import evaluate


class Function(nn.Module):
    """A module of one function of tensors."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *operands: Tensor) -> Tensor:
        return self.function(*operands)


IMAGES = ((2, 4, 9, 7), (1, 4, 12, 7), (3, 4, 10, 7), (0, 4, 9, 7))
ROWS = ((3, 6, 7), (1, 5, 7), (0, 6, 7))
UP, FORMS = torch.linspace(-1, 1, 72).reshape(6, 4, 3), torch.linspace(-1, 1, 42).reshape(2, 3, 7)
EDGES = torch.tensor([-1.0, 0.0, 0.0, 1.0])
KERNEL = torch.linspace(-1, 1, 48).reshape(4, 2, 2, 3)
GRID, SCALE = torch.rand(1, 3, 2, 2) * 2 - 1, torch.arange(4.0)

ON_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "maxima": lambda x: F.max_pool2d(x, 3, 2, 1),
    "maxima with dilation": lambda x: F.max_pool2d(x, (2, 3), (1, 2), 1, 2, True),
    "averages": lambda x: F.avg_pool2d(x, 2),
    "a transposed convolution of groups": lambda x: F.conv_transpose2d(
        x, KERNEL.to(x.dtype), SCALE.to(x.dtype)[:4], (2, 3), (0, 1), (1, 0), 2, (1, 2)
    ),
    "averages of what is inside": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "averages beyond the padding": lambda x: F.avg_pool2d(x, 3, 2, 1, True),
    "averages by a divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "adaptive averages": lambda x: F.adaptive_avg_pool2d(x, (2, 4)),
    "maxima of all": lambda x: F.adaptive_max_pool2d(x, 1),
    "norms of windows": lambda x: F.lp_pool2d(x.abs(), 2, 2),
    "a group norm": lambda x: F.group_norm(x, 2, SCALE, SCALE - 1),
    "a group norm alone": lambda x: F.group_norm(x, 4),
    "an instance norm": lambda x: F.instance_norm(x),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear with corners": lambda x: F.interpolate(
        x, size=(5, 11), mode="bilinear", align_corners=True
    ),
    "a grid": lambda x: F.grid_sample(
        x, GRID.to(x.dtype).expand(x.shape[0], -1, -1, -1), align_corners=False
    ),
}
ON_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "maxima of rows": lambda x: F.max_pool1d(x, 3, 2, 1),
    "averages of rows": lambda x: F.avg_pool1d(x, 3, 2, 1),
    "adaptive averages of rows": lambda x: F.adaptive_avg_pool1d(x, 3),
    "a median": lambda x: x.median(1)[0],
    "taken along an axis": lambda x: x.take_along_dim(x.argmax(1, True)[..., :1], 1),
    "means of what is scattered": lambda x: x.scatter_reduce(1, x.argsort(1) // 2, x, "mean"),
    "only what is scattered": lambda x: x.scatter_reduce(
        -1, x.argsort(-1) // 2, x, "amax", include_self=False
    ),
    "the second smallest": lambda x: x.kthvalue(2, keepdim=True)[0],
    "powers of two": lambda x: torch.ldexp(x, torch.tensor(2)),
    "logarithms of running sums": lambda x: x.logcumsumexp(1),
    "a bilinear product": lambda x: F.bilinear(x[..., :3], x, FORMS.to(x.dtype)),
    "hyperbolic": lambda x: torch.asinh(x * 9) + torch.acosh(x.abs() + 1) + torch.atanh(x.sin()),
    "lengths": lambda x: torch.hypot(x, x.flip(-1)) + x.exp2(),
    "signs": lambda x: torch.copysign(x, x.roll(1, 1)) + torch.signbit(x),
    "numbers before NaN": lambda x: torch.fmax(x.sqrt(), x) - torch.fmin(x.log(), x),
}
ON_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "frequencies": lambda x: torch.view_as_real(torch.fft.rfft(x.float(), norm="ortho")).to(x),
    "frequencies of two axes": lambda x: torch.fft.fft2(x.float()).real.to(x.dtype),
    "half of the frequencies": lambda x: torch.fft.irfft(
        torch.fft.rfft(x.float(), dim=1)[:, :3], n=9, dim=1
    ).to(x.dtype),
    "a product and a vector": lambda x: torch.addmv(
        x[0, :, 0], x.sum(0), UP.to(x.dtype)[0, :, 0].repeat(2)[:7], beta=2
    ),
}
COUNTS: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "positions among sorted ones": (lambda x: torch.searchsorted(x.sort(-1)[0], x * 1.5), ROWS),
    "positions to the right": (lambda x: torch.searchsorted(EDGES, x.log(), right=True), ROWS),
}
RESPONSES = {"a local response norm": (lambda x: F.local_response_norm(x, 2), IMAGES[:3])}
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = (
    {name: (f, IMAGES) for name, f in ON_IMAGES.items()}
    | {name: (f, ROWS) for name, f in ON_ROWS.items()}
    | {name: (f, ROWS[:2]) for name, f in ON_TOKENS.items()}
    | RESPONSES
    | COUNTS
)


def names_without_loops(graph: Any) -> set[str]:
    return {op.name for op in graph.ops if op.name.removeprefix("aten.") not in EMIT} - EMIT.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_eager_does(name: str) -> None:
    """At other sizes than the example's, too: a branch on a size would show here."""
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(1)
    module = Function(function).eval()
    xs = [torch.randn(shape, generator=generator) for shape in shapes]
    captured = capture(module, (xs[0],))
    assert names_without_loops(captured.program.graph) == set()
    for x in xs:
        (y,) = evaluate(captured.program.graph, [x], captured.program.weights)
        torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize("name", sorted(CASES.keys() - RESPONSES.keys() - COUNTS.keys()))
def test_bfloat16_is_as_close_to_float32_as_eager_is(name: str) -> None:
    """Eager rounds elsewhere. One unit of the largest result is the error of its last rounding;
    it has no local response norm of bfloat16, and counts are not near one another."""
    function, shapes = CASES[name]
    module = Function(function).eval()
    x = torch.randn(shapes[0], generator=torch.Generator().manual_seed(1)).bfloat16()
    captured = capture(module, (x,))
    (y,) = evaluate(captured.program.graph, [x], captured.program.weights)
    eager, exact = module(x), module(x.float())
    unit = exact.abs().max() * torch.finfo(torch.bfloat16).eps
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= (eager - exact).abs().max() + unit


WINDOWS = st.tuples(*[st.integers(1, 4)] * 4, *[st.integers(0, 2)] * 2, *[st.integers(1, 2)] * 2)
HARD = torch.tensor([math.nan, -math.inf, math.inf])


@settings(max_examples=150, deadline=None)
@given(
    windows=WINDOWS,
    sizes=st.tuples(st.integers(0, 2), st.integers(5, 9), st.integers(5, 9)),
    ceil=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.int64]),
    hard=st.booleans(),
)
def test_pools_are_eagers(
    windows: tuple[int, ...],
    sizes: tuple[int, int, int],
    ceil: bool,
    dtype: torch.dtype,
    hard: bool,
) -> None:
    """With NaN, infinities and integers, at any size, stride and padding that eager accepts."""
    kernel, stride, padding, dilation = (list(windows[n : n + 2]) for n in (0, 2, 4, 6))
    padding = [min(p, k // 2) for p, k in zip(padding, kernel, strict=True)]
    dilation = [min(d, 4 // k + (k == 1)) for d, k in zip(dilation, kernel, strict=True)]
    b, h, w = sizes
    x = (torch.randn(b, 2, h, w) * 9).to(dtype)
    if hard and dtype.is_floating_point:
        x = torch.where(torch.rand(x.shape) < 0.2, HARD[torch.randint(0, 3, x.shape)], x)
    maxima, positions = max_pool2d(x, kernel, stride, padding, dilation, ceil)
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
    torch.testing.assert_close((maxima, positions), expected, equal_nan=True)
    if not dtype.is_floating_point:
        return
    for arguments in ((True, None), (False, None), (True, 7)):
        y = avg_pool(x, kernel, stride, padding, ceil, *arguments, axes=2)
        eager = F.avg_pool2d(x, kernel, stride, padding, ceil, *arguments)
        torch.testing.assert_close(y, eager, equal_nan=True)


HOLES = torch.tensor([[3, 1, 2, 7], [4, math.nan, 0, 1], [-math.inf, math.inf, 0, math.nan]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_what_is_scattered_is_reduced(reduce: str, dtype: torch.dtype) -> None:
    """With fewer indices than values, and rows that nothing is written to."""
    x, src = (torch.randint(-9, 9, shape).to(dtype) for shape in ((5, 3), (8, 4)))
    index = torch.randint(0, 4, (7, 3))
    for include_self in (True, False):
        eager = x.scatter_reduce(0, index, src, reduce, include_self=include_self)
        y = scatter_reduce(x, 0, index, src, reduce, include_self=include_self)
        assert y is NotImplemented if include_self and reduce != "mean" else y.equal(eager)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("keepdim", [False, True])
def test_order_statistics_are_eagers(dim: int, keepdim: bool) -> None:
    """No value is twice on an axis, so that positions can be compared; NaN is the largest."""
    for x in (HOLES, HOLES[:2].nan_to_num(9).long(), torch.randn(5, 6)):
        for k in (1, 2):
            eager = torch.kthvalue(x, k, dim, keepdim)
            torch.testing.assert_close(kthvalue(x, k, dim, keepdim), tuple(eager), equal_nan=True)
        eager = torch.median(x, dim, keepdim)
        torch.testing.assert_close(median(x, dim, keepdim), tuple(eager), equal_nan=True)


IDS, OFFSETS = torch.tensor([3, 1, 3, 0, 3, 5, 1]), torch.tensor([0, 0, 2, 3, 7])


@pytest.mark.parametrize("padding", [-1, 3])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_eagers(mode: str, closed: bool, padding: int) -> None:
    """With empty bags at both ends, and a bag of padding only."""
    table = torch.randn(6, 4)
    scales = torch.randn(7) if mode == "sum" else None
    number = ("sum", "mean", "max").index(mode)
    y, *_ = embedding_bag(table, IDS, OFFSETS, False, number, False, scales, closed, padding)
    options = {"include_last_offset": closed, "padding_idx": padding if padding >= 0 else None}
    eager = F.embedding_bag(IDS, table, OFFSETS, mode=mode, per_sample_weights=scales, **options)
    torch.testing.assert_close(y, eager)


@pytest.mark.parametrize("gradients", [False, True])
def test_bags_of_equal_sizes_are_compiled(gradients: bool) -> None:
    """torch has one operator for weights with gradients, and another for those without."""
    bags = nn.EmbeddingBag(6, 4, mode="max", padding_idx=3).requires_grad_(gradients).eval()
    compiled = moec.compile(bags, (torch.randint(0, 6, (3, 5)),))
    for shape in ((1, 4), (4, 1)):
        ids = torch.randint(0, 6, shape)
        torch.testing.assert_close(compiled(ids), bags(ids).detach())


COMPILED = (
    "maxima with dilation",
    "averages of what is inside",
    "a group norm",
    "a grid",
    "a transposed convolution of groups",
    "half of the frequencies",
    "signs",
)


@pytest.mark.parametrize("name", COMPILED)
def test_machine_code_computes_what_eager_does(name: str) -> None:
    function, shapes = CASES[name]
    module = Function(function).eval()
    compiled = moec.compile(module, (torch.randn(shapes[0]),))
    for shape in shapes[:3]:
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), module(x))


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool3d_with_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x.long(), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_pools_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"operator aten\.{name}\.default has no kernel"):
        moec.compile(Function(REFUSED[name]).eval(), (torch.randn(2, 4, 8, 8),))


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(6, 4, mode=mode)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.bags(ids, offsets)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["max", "sum"])
def test_offsets_of_bags_that_are_an_input_are_refused(mode: str) -> None:
    """torch ends the process at some that do not ascend, so that none may be drawn."""
    with pytest.raises(CaptureError, match=r"offsets of an EmbeddingBag are an input .*ascend"):
        moec.compile(Bags(mode).eval(), (IDS, OFFSETS), build=False, verify=False)
