"""Parts of sizes with one value within the bounds are numbers, in graphs and in compiled code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import moec
from moec.capture.sizes.fixed_axes import fold_constant_sizes
from moec.ir.graph import Program
from moec.ir.sizes.dims import Bounds
from moec.ir.text import parse, print_graph


def _folded(size: str, bounds: Bounds) -> str:
    """The size of the op's result after folding."""
    graph = parse(
        "graph main(x: f32[S, 4]) {\n"
        f"  y: f32[{size}] = aten.zeros.default() <size=({{{size}}})>\n"
        "  return y\n}"
    )
    program = fold_constant_sizes(Program(replace(graph, bounds={"S": bounds}), {}))
    return print_graph(program.graph).split("y: f32[")[1].split("] =")[0]


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ("32*floor(S/4) + S", Bounds(16, 19), "S + 128"),
        ("floor(floor(S/4)/2)", Bounds(16, 19), "2"),
        ("Max(S, 8) + Min(S, 2)", Bounds(3, 8), "10"),
        ("Mod(S, 4)", Bounds(5, 5), "1"),
        ("floor(S/4)", Bounds(16, 20), "floor(S/4)"),
        ("floor(S/4)", Bounds(16), "floor(S/4)"),
        ("floor(S/200)", Bounds(1, 100), "floor(S/200)"),
    ],
)
def test_what_is_one_number_within_the_bounds(size: str, bounds: Bounds, expected: str) -> None:
    assert _folded(size, bounds) == expected


class Patches(nn.Module):
    """Patches of four pixels, and a weight and positions for images of four patches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = x.unfold(1, 4, 4).mean(-1)
        patches = patches + self.positions.expand_as(patches)
        return self.head(patches.reshape(x.shape[0], -1))


def test_rows_of_one_length_meet_a_weight() -> None:
    torch.manual_seed(0)
    model = Patches().eval()
    compiled = moec.compile(model, (torch.randn(2, 16, 3),), verify=False)
    program = compiled.captured.program
    assert program.graph.bounds["S"] == Bounds(16, 19)
    assert all(isinstance(v.shape[-1], int) for op in program.graph.ops for v in op.outputs)
    for batch, length in ((1, 16), (3, 18), (2, 19)):
        x = torch.randn(batch, length, 3)
        # Sums of 4 and of 12 numbers of size 1, in another order.
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
