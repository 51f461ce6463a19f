"""Experts that read all of their rows, which have no block: captured with masks, equal to eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate

WIDTH = 8
SIZES = (0, 1, 2, 5, 13, 40)

Use = Callable[[Tensor, nn.Linear], Tensor]


class Loop(nn.Module):
    """Experts over the rows that chose them; `capacity` limits the rows of each."""

    def __init__(self, use: Use, capacity: bool = False, least: int = 1) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.use, self.capacity, self.least = use, capacity, least

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        capacity = max(1, x.shape[0] // 3)
        if self.least > 1 and capacity < self.least:
            capacity = self.least
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == number)
            if self.capacity and len(rows) > capacity:
                rows, slots = rows[:capacity], slots[:capacity]
            if len(rows) == 0:
                continue
            y.index_add_(0, rows, self.use(x[rows], expert) * weights[rows, slots, None])
        return y


class Thresholds(nn.Module):
    """As many experts a token as pass a threshold, at least one; a mask and an expert index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.limits = nn.Parameter(torch.zeros(3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.gate(x) * self.scale.clamp(max=4.6).exp())
        passed = scores > torch.sigmoid(self.limits)
        best = nn.functional.one_hot(scores.argmax(-1), 3).bool()
        chosen = torch.where(passed.any(-1, keepdim=True), passed, best).float()
        weights = chosen / chosen.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen[:, number] > 0
            if mask.any():
                y[mask] += expert(x[mask]) * weights[mask, number][:, None]
        return y


class Shift(nn.Module):
    """A number is added to the rows of each expert, as is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).softmax(-1) > 0.34
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen[:, number]
            y[mask] += expert(x[mask])
            y[mask] += 1.5
        return y


USES: dict[str, Use] = {
    "number": lambda x, layer: layer(x) / max(1, x.shape[0]),
    "root of the number": lambda x, layer: layer(x) / math.sqrt(x.shape[0]) + x.shape[0] * 0.1,
    "condition on the number": lambda x, layer: layer(x) * (x.shape[0] > 2),
    "positions": lambda x, layer: layer(x) + torch.arange(len(x))[:, None],
    "mean": lambda x, layer: layer(x - x.mean(0, keepdim=True)) + x.mean(),
}


def check(module: nn.Module, sizes: Sequence[int] = SIZES) -> None:
    torch.manual_seed(0)
    compiled = moec.compile(module.eval(), (torch.randn(12, WIDTH),), build=False, verify=False)
    program = compiled.pass_results[-1].program
    assert not [op for op in program.graph.ops if op.name == "aten.nonzero.default"]
    for size in sizes:
        for scale in (1.0, 30.0):
            x = torch.randn(size, WIDTH) * scale
            (result,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(result, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", USES)
def test_an_expert_that_reads_its_rows(use: str) -> None:
    check(Loop(USES[use]))


def test_masks_beside_an_index() -> None:
    check(Thresholds())


def test_a_number_is_added_to_the_rows_of_a_mask() -> None:
    check(Shift())


@pytest.mark.parametrize("use", ["number", "mean"])
def test_an_expert_that_reads_at_most_a_capacity_of_rows(use: str) -> None:
    check(Loop(USES[use], capacity=True))


def test_a_branch_on_the_capacity_limits_the_sizes() -> None:
    check(Loop(USES["number"], capacity=True, least=3), sizes=(9, 10, 40))


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda x, layer: layer(x.flip(0)), "aten.flip.default"),
        (lambda x, layer: layer(x) + x.sort(0)[0], "sort"),
        (lambda x, layer: layer(x) / (x.abs().max() + 1), r"the graph fails at inputs \(\d+, 8\)"),
        (lambda x, layer: layer(x) - x.amax(0), "a maximum of no rows fails"),
        (lambda x, layer: layer(x) - x.max(0).values, "a maximum of no rows fails"),
        (
            lambda x, layer: layer(x) / (x.std(0, unbiased=False) + 0.1),
            "var.correction reduces",
        ),
        (
            lambda x, layer: layer(x) / (x.norm() + 1),
            "vector_norm.default reduces",
        ),
        (lambda x, layer: layer(x) + x.softmax(0), "softmax.int reduces"),
        (lambda x, layer: layer(x.cumsum(0)), "rows go through aten.cumsum.default"),
        (lambda x, layer: layer(x) * (x > 1).any(0), "rows go through aten.any.dim"),
    ],
)
def test_what_no_mask_expresses_is_refused(use: Use, words: str) -> None:
    with pytest.raises(moec.MoecError, match=words):
        moec.compile(Loop(use).eval(), (torch.randn(12, WIDTH),), verify=False)
