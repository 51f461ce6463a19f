"""One choice for several rows: all pixels of an image go to one expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moec
from moec.interpret.evaluate import evaluate

D, E, N = 4, 3, 5


class Pictures(nn.Module):
    """h[B, N, D], key[B, D]: a picture goes to the expert of its key, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D)) for _ in range(E)
        )

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        route = self.gate(key).softmax(-1).argmax(-1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            picture = torch.where(route == number)[0]
            y = y.index_add(0, picture, expert(h[picture]))
        return y


class Columns(Pictures):
    """h[N, B, D]: the rows of an image are not consecutive."""

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        route = self.gate(key).softmax(-1).argmax(-1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            picture = torch.where(route == number)[0]
            y = y.index_add(1, picture, expert(h[:, picture]))
        return y


def recognised(module: nn.Module, axis: int) -> moec.CompiledModel:
    torch.manual_seed(0)
    shape = (2, N, D) if axis == 0 else (N, 2, D)
    pictures = torch.export.Dim("B", min=1, max=64)
    x = (torch.randn(shape), torch.randn(2, D))
    return moec.compile(
        module.eval(), x, dynamic_shapes=({axis: pictures}, {0: pictures}),
        stop_after="recognise-routers",
    )  # fmt: skip


def test_rows_of_a_picture_share_its_choice() -> None:
    result = recognised(Pictures(), 0)
    (block,) = result.blocks
    assert (block.experts, block.top_k, block.router) == (E, 1, "softmax, top-1")
    ops = result.pass_results[-1].program.graph.ops
    (route,) = [op for op in ops if op.name == "moe.route"]
    assert [str(dim) for dim in route.outputs[1].shape] == ["B", "1"]  # once a picture
    program = result.pass_results[-1].program
    inputs = [torch.randn(4, N, D), torch.randn(4, D)]
    with torch.no_grad():
        right = result.source.model(*inputs)
    (rows,) = evaluate(program.graph, inputs, program.weights)
    torch.testing.assert_close(rows, right, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_stand_together() -> None:
    """The hypothesis is that a picture's rows follow each other: the proof refuses it."""
    result = recognised(Columns(), 1)
    assert result.blocks == ()
    assert result.declined
