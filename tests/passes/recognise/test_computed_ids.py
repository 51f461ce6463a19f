"""Ids that no op chooses: a one-hot mask used as the ids of k = E experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import distance

D, E = 4, 3


class MaskAsIds(nn.Module):
    """x[T, D]: entry e of a token's mask, 0 or 1, is the id of the expert that has weight e. So
    does nllb_moe of transformers 5.24."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D)) for _ in range(E)
        )

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
