"""Convolutions become linear layers: disjoint and overlapping kernels, any number of axes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph

TOLERANCE = 1e-5  # of the greatest value: float32 sums of at most 100 terms, in another order
CONVOLUTION = "aten.convolution.default"
SIZES = {
    "patches": (lambda: nn.Conv2d(3, 8, 4, 4), (2, 3, 16, 12)),
    "patches, the rest is cut off": (lambda: nn.Conv2d(3, 8, 4, 4, bias=False), (2, 3, 18, 15)),
    "patches of other sides": (lambda: nn.Conv2d(2, 4, (2, 3), (2, 3)), (1, 2, 6, 9)),
    "tubes": (lambda: nn.Conv3d(2, 6, 2, 2), (1, 2, 4, 6, 2)),
    "one position": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 3, 3)),
    "same": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 11)),
    "even kernel": (lambda: nn.Conv1d(6, 4, 4), (3, 6, 9)),
    "stride": (lambda: nn.Conv1d(6, 4, 5, stride=2, padding=2), (2, 6, 10)),
    "dilation": (lambda: nn.Conv1d(6, 4, 3, dilation=2, padding=2, bias=False), (2, 6, 12)),
    "picture": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 7)),
    "picture, stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=(1, 0)), (2, 3, 8, 9)),
    "stride beyond the kernel": (lambda: nn.Conv1d(4, 4, 2, stride=3), (1, 4, 11)),
}


def captured(layer: nn.Module, shape: tuple[int, ...], **options: object) -> moec.CompiledModel:
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("B", max=64)}
    return moec.compile(
        layer.eval(), (torch.randn(shape),), dynamic_shapes=(sizes,), verify=False, build=False,
        **options,
    )  # fmt: skip


def evaluated(model: moec.CompiledModel, x: Tensor) -> Tensor:
    program = model.pass_results[-1].program
    return evaluate(program.graph, [x], program.weights)[0]


def names(model: moec.CompiledModel) -> list[str]:
    return [op.name for op in model.graph.ops]


@pytest.mark.parametrize("case", SIZES)
def test_equal_to_eager(case: str) -> None:
    make, shape = SIZES[case]
    layer = make()
    model = captured(layer, shape)
    assert "aten.linear.default" in names(model)
    assert CONVOLUTION not in names(model)
    for batch in (1, shape[0], 3):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            expected, result = layer(x), evaluated(model, x)
        assert result.shape == expected.shape
        assert float((result - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def test_text(golden: Callable[[str], None]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.near = nn.Conv2d(3, 8, 4, 4), nn.Conv1d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.near(self.patch(x).flatten(2))

    golden(print_graph(captured(Both(), (2, 3, 8, 8)).graph))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 6, 3, padding=1, groups=6),
        nn.Conv1d(6, 4, 3, padding=2),
        nn.Conv1d(6, 4, 3, padding=1, groups=2),
    ],
    ids=["each channel", "causal", "groups"],
)
def test_what_stays_a_loop(layer: nn.Module) -> None:
    assert CONVOLUTION in names(captured(layer, (2, 6, 8)))


def test_a_kernel_of_many_positions_is_declined_in_words() -> None:
    model = captured(nn.Conv2d(1, 2, 6), (1, 1, 8, 8))
    assert CONVOLUTION in names(model)
    declined = [d for p in model.pass_results for d in p.declined]
    assert any("its kernel has 36 positions, and 32 copies" in str(d) for d in declined)


def test_it_can_be_left_out() -> None:
    model = captured(nn.Conv1d(6, 4, 3, padding=1), (2, 6, 8), passes="-expand-convolutions")
    assert CONVOLUTION in names(model)


def test_a_sequence_of_any_length() -> None:
    layer = nn.Conv1d(4, 6, 3, stride=2, padding=1).eval()
    sizes = {0: torch.export.Dim("B", max=8), 2: torch.export.Dim("N", min=2, max=64)}
    x = torch.randn(2, 4, 9)
    model = moec.compile(layer, (x,), dynamic_shapes=(sizes,), verify=False)
    for length in (2, 3, 9, 24):
        x = torch.randn(3, 4, length)
        with torch.no_grad():
            expected = layer(x)
        assert float((model(x) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
