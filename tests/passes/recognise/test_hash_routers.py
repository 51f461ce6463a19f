"""Experts that ids of tokens choose, by a table or by arithmetic, as in hash layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

D, E, WORDS = 8, 4, 30
CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "indexed": lambda table, ids: table[ids],
    "embedded": lambda table, ids: F.embedding(ids, table),
    "computed": lambda table, ids: torch.stack([ids % E, (7 * ids + 1) % E], -1),
}


class Hashed(nn.Module):
    """Scores weigh the experts, and do not choose them (arXiv 2106.04426)."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor], logits: bool = False) -> None:
        super().__init__()
        self.choose, self.logits = choose, logits
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.register_buffer("table", torch.randint(E, (WORDS, 2)))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        scores = F.softplus(self.gate(x)).sqrt()
        numbers = words + scores.argmax(-1) if self.logits else words
        ids = self.choose(self.table, numbers % WORDS)
        weights, out = scores.gather(1, ids), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("name", CHOICES)
def test_experts_are_chosen_by_words(name: str) -> None:
    """That an embedding's rows are experts was not known, and its block was lost."""
    for logits, router in ((False, "hash of words"), (True, "custom")):
        module = Hashed(CHOICES[name], logits)
        model = moec.compile(module, (torch.randn(5, D), torch.randint(WORDS, (5,))), verify=1e-5)
        assert [block.router for block in model.blocks] == [router]
