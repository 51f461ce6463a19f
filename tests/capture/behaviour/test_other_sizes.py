"""A description holds at the sizes at which the module's own code changes, or it is refused."""

from __future__ import annotations

import torch
from torch import nn

import moec
from moec.capture.behaviour.other_sizes import guards_of_graph
from moec.capture.sizes.guards import show
from moec.interpret.evaluate import evaluate
from moec.ir.text import parse
from tests.capture.behaviour.modules import EXPERTS, WIDTH, expert


class OfBatches(nn.Module):
    """Top-2 of its experts, whose number or weights depend on the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def choose(self, x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(k)
        return weights, ids

    def mix(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for i, part in enumerate(self.experts):
            rows, slots = torch.where(ids == i)
            y.index_add_(0, rows, part(x[rows]) * weights[rows, slots, None])
        return y


class FewerOfMany(OfBatches):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        return self.mix(flat, *self.choose(flat, 2 if x.shape[0] < 1500 else 1)).view(x.shape)


def test_a_block_is_not_observed_where_a_size_of_the_code_changes() -> None:
    module = FewerOfMany().eval()
    compiled = moec.compile(module, (torch.randn(2, 4, WIDTH),), build=False, verify=False)
    (high,) = (limits.high for limits in compiled.graph.bounds.values() if limits.high)
    program, x = compiled.pass_results[-1].program, torch.randn(3, 4, WIDTH)
    assert high == 1499
    with torch.no_grad():
        torch.testing.assert_close(evaluate(program.graph, [x], program.weights)[0], module(x))


def test_the_conditions_of_sizes_in_a_graph() -> None:
    graph = parse(
        """graph main(x: f32[B, S, 8]) {
          size B in [2, 9]
          y: f32[Min(B, 4), S, 8] = aten.slice.Tensor(x) <dim=0, start=0, end={Min(B, 4)}>
          return y
        }"""
    )
    assert {show(guard.condition) for guard in guards_of_graph(graph)} == {
        "B >= 2",
        "B <= 9",
        "4 >= B",
    }
