"""Masks with at most one expert a token by their form; others are not taken for choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.capture import capture
from moec.ir.interpret.evaluate import evaluate
from moec.passes.recognise.region import Scope
from moec.passes.recognise.routers.one_hot_masks import at_most_one

E = 4


class Mask(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, p: Tensor) -> Tensor:
        return self.mask(p)


def hot(p: Tensor) -> Tensor:
    return nn.functional.one_hot(p.argmax(-1), E)


ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "one_hot": hot,
    "compared": lambda p: (p.argmax(-1)[:, None] == torch.arange(E)).float(),
    "dropped": lambda p: hot(p) * (p > 0.4),
    "cleared": lambda p: hot(p).masked_fill(p < 0.4, 0),
    "kept": lambda p: torch.where(p > 0.4, hot(p), 0),
    "scattered": lambda p: torch.zeros_like(p).scatter(1, p.argmax(-1, keepdim=True), 1.0),
    "none beyond": lambda p: nn.functional.one_hot(p.argmax(-1) + 1, E + 1)[:, :E],
    "one of two": lambda p: torch.where((p[:, :1] > 0.4), hot(p), hot(-p)),
    "turned": lambda p: hot(p).T[:, None].permute(2, 1, 0),
    "positive": lambda p: ((hot(p) * p).float() > 0).float(),
}
MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "threshold": lambda p: (p > 0.485).float(),
    "greatest": lambda p: (p == p.amax(-1, keepdim=True)).float(),
    "two": lambda p: nn.functional.one_hot(p.topk(2).indices, E).sum(1),
    "either": lambda p: hot(p) + hot(-p),
    "not": lambda p: (hot(p) != 1).float(),
    "one or threshold": lambda p: torch.where((p[:, :1] > 0.4), hot(p).bool(), p > 0.3).float(),
    "by expert": lambda p: torch.where(p > 0.4, hot(p), hot(-p)),
    "scattered twice": lambda p: torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0),
}


@pytest.mark.parametrize("kind", [*ONE, *MORE])
def test_a_mask(kind: str) -> None:
    program = capture(Mask((ONE | MORE)[kind]).eval(), (torch.rand(6, E),)).program
    last = program.graph.producers[program.graph.outputs[0]].inputs[0]
    scope = Scope(program.graph, program.weights)
    assert at_most_one(scope, scope.source_of(last)) == (kind in ONE)


class Threshold(nn.Module):
    """Two experts of a token pass the threshold so rarely that no random input shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, E)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        mask = (self.gate(x).softmax(-1) > 0.485).long()
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (y * mask[..., None]).sum(1)


def test_a_threshold_is_no_choice_of_one_expert() -> None:
    module = Threshold().eval()
    with torch.no_grad():
        module.gate.weight.copy_(torch.eye(E, 8))
        module.gate.bias.zero_()
    compiled = moec.compile(module, (torch.randn(6, 8),), build=False, verify=False)
    x = torch.randn(3, 8)
    x[0, :E] = torch.tensor([9.0, 9.0, -9.0, -9.0])
    program = compiled.pass_results[-1].program
    (result,) = evaluate(program.graph, [x], program.weights)
    torch.testing.assert_close(result, module(x))
