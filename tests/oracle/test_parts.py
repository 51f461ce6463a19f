"""Ids of which only one changes anything, and only for one token: an example that is cut to one
token has one id, so that its other parts must be compared too."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import InputError
from tests.fuzz.judge import interpreted

D, E, IDS = 8, 4, 4


class Layer(nn.Module):
    """The logits of id 3 are masked; those of other ids are not."""

    def __init__(self, condition: str) -> None:
        super().__init__()
        self.condition = condition
        self.router = nn.Linear(D, E)
        self.experts = nn.Parameter(torch.randn(E, D, D) / 3)
        self.register_buffer("closed", torch.zeros(IDS, E, dtype=torch.bool))
        self.closed[3, 1:] = True

    def holds(self, x: Tensor) -> bool:
        B, S = x.shape[:2]
        return {
            "one token": B == 1 and S == 1,
            "one text": B == 1,
            "short": S == 1,
            "few": B * S <= 2,
            "always": True,
        }[self.condition]

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        logits = self.router(h)
        if self.holds(x):
            logits = logits.masked_fill(self.closed[ids.flatten()], -1e4)
        weights, chosen = logits.softmax(-1).topk(2, -1)
        dense = torch.zeros_like(logits).scatter(1, chosen, weights)
        return torch.einsum("te,edf,td->tf", dense, self.experts, h).view_as(x)


@pytest.mark.parametrize("in_turn", [True, False], ids=["in turn", "random"])
@pytest.mark.parametrize("condition", ["one token", "one text", "short", "few", "always"])
def test_every_id_at_every_size(condition: str, in_turn: bool) -> None:
    torch.manual_seed(0)
    layer = Layer(condition).eval()
    ids = torch.arange(12).view(2, 6) % IDS if in_turn else torch.randint(IDS, (2, 6))
    run = interpreted(moec.compile(layer, (torch.randn(2, 6, D), ids), build=False, verify=False))
    equal = 0
    for (B, S), number in itertools.product(((1, 1), (1, 2), (2, 1), (1, 5), (3, 4)), range(IDS)):
        inputs = torch.randn(B, S, D), torch.full((B, S), number)
        try:
            result = run(*inputs)
        except InputError:
            continue
        equal += 1
        with torch.no_grad():
            torch.testing.assert_close(result, layer(*inputs), rtol=1e-4, atol=1e-5)
    assert equal >= 4  # 3 x 4 at least
