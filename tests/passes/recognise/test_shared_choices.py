"""Other ids than one choice for each row: all pixels of an image go to one expert, or the one-hot
mask is the ids of k = E experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import distance

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


class Several(Pictures):
    """A picture goes to two experts, and their results are weighted."""

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        weights, route = self.gate(key).softmax(-1).topk(2, -1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            picture, slot = torch.where(route == number)
            result = expert(h[picture]) * weights[picture, slot, None, None]
            y = y.index_add(0, picture, result)
        return y


class Masked(Pictures):
    """As above, where every expert reads all pictures."""

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        weights, route = self.gate(key).softmax(-1).topk(2, -1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            share = (weights * (route == number)).sum(-1)
            y = y + expert(h) * share[:, None, None]
        return y


class Limited(Several):
    """An expert takes two pictures, not two rows."""

    def forward(self, h: Tensor, key: Tensor) -> Tensor:
        weights, route = self.gate(key).softmax(-1).topk(2, -1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            picture, slot = torch.where(route == number)
            picture, slot = picture[:2], slot[:2]
            result = expert(h[picture]) * weights[picture, slot, None, None]
            y = y.index_add(0, picture, result)
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


@pytest.mark.parametrize(
    ("module", "top_k"), [(Pictures(), 1), (Several(), 2), (Masked(), 2)], ids=["1", "2", "mask"]
)
def test_rows_of_a_picture_share_its_choices(module: nn.Module, top_k: int) -> None:
    result = recognised(module, 0)
    (block,) = result.blocks
    assert (block.experts, block.top_k, block.router) == (E, top_k, f"softmax, top-{top_k}")
    ops = result.pass_results[-1].program.graph.ops
    (route,) = [op for op in ops if op.name == "moe.route"]
    assert [str(dim) for dim in route.outputs[1].shape] == ["B", str(top_k)]  # once a picture
    program = result.pass_results[-1].program
    for count in (1, 2, 4, 9):
        inputs = [torch.randn(count, N, D), torch.randn(count, D)]
        with torch.no_grad():
            right = result.source.model(*inputs)
        (rows,) = evaluate(program.graph, inputs, program.weights)
        torch.testing.assert_close(rows, right, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_stand_together() -> None:
    """The hypothesis is that a picture's rows follow each other: the proof refuses it."""
    result = recognised(Columns(), 1)
    assert result.blocks == ()
    assert result.declined


def test_a_limit_of_pictures_is_no_limit_of_rows() -> None:
    result = recognised(Limited(), 0)
    assert result.blocks == ()
    assert any("the numbers differ" in declined.reason for declined in result.declined)


class MaskAsIds(Pictures):
    """x[T, D]: entry e of a token's mask, 0 or 1, is the id of the expert that has weight e. So
    does nllb_moe of transformers 5.24."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        mask = F.one_hot(weights.argmax(-1), E) * (weights > 0.1)
        chosen = F.one_hot(mask, E)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + (weights * chosen[..., e]).sum(-1, keepdim=True) * expert(x)
        return y


def test_a_mask_read_as_ids_is_a_block() -> None:
    torch.manual_seed(0)
    model = MaskAsIds().eval()
    compiled = moec.compile(model, (torch.randn(7, D),), build=False)
    (block,) = compiled.blocks
    assert (block.experts, block.top_k) == (E, E)
    program = compiled.pass_results[-1].program
    for tokens in (1, 7, 20):
        x = torch.randn(tokens, D) * 2
        (y,) = evaluate(program.graph, [x], program.weights)
        assert distance(y, model(x).detach()) < 1e-6  # sums in another order
