"""A module of your own: what moec recognises in it, and what it declines, with the reason.

The first layer is typical mixture-of-experts code: a router, and a loop that gives every expert the
tokens that chose it. The second layer weights all of its experts for every token: also a block, but
without a choice.

Two more layers do what torch.export refuses, and show other ways to capture a module. One reads
counts into Python; its branches are speculated on, and the result is proved. The other makes Python
lists of tokens whose lengths depend on the data; its author says in plain PyTorch what it computes,
and the two are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


def feed_forward(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Routed(nn.Module):
    """Each token goes to the two experts with the highest router probability."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(feed_forward(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        weights, chosen = F.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Mixed(nn.Module):
    """Every token is a weighted sum of all experts."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(feed_forward(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        weights = F.softmax(self.router(x), dim=-1)
        each = torch.stack([expert(x) for expert in self.experts], dim=1)  # [T, E, D]
        return (weights[:, :, None] * each).sum(dim=1)


class Counted(Routed):
    """Counts are read into Python, and experts without tokens are skipped."""

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        weights, chosen = F.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        for index, count in enumerate(counts):
            if count == 0:
                continue
            token, slot = torch.where(chosen == index)
            y = y.index_add(0, token, self.experts[index](x[token]) * weights[token, slot, None])
        return y


class Listed(Routed):
    """Python code makes a list of tokens for each expert."""

    def forward(self, x: Tensor) -> Tensor:  # [T, D] -> [T, D]
        weights, chosen = F.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        pairs = chosen.tolist()
        for index, expert in enumerate(self.experts):
            token = [number for number, pair in enumerate(pairs) if index in pair]
            if token:
                share = (weights[token] * (chosen[token] == index)).sum(-1, keepdim=True)
                y[token] += share * expert(x[token])
        return y


def listed_in_pytorch(module: Listed, x: Tensor) -> Tensor:
    """What Listed computes, as Routed does it."""
    weights, chosen = F.softmax(module.router(x), dim=-1).topk(2, dim=-1)
    y = torch.zeros_like(x)
    for index, expert in enumerate(module.experts):
        token, slot = torch.where(chosen == index)
        y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
    return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routed = Routed(width=64, hidden=128, experts=8)
        self.mixed = Mixed(width=64, hidden=128, experts=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.routed(x)
        return x + self.mixed(x)


torch.manual_seed(0)
model = Model().eval()
x = torch.randn(33, 64)
compiled = moec.compile(model, (x,))

print("recognised:")
for block in compiled.blocks:
    print(f"  {block.name}: {block.experts} experts, top-{block.top_k}, {block.router}")
    print(f"    experts {block.activation}, written as: {block.form}")
print("declined:")
for candidate in compiled.declined:
    print(f"  {candidate.where}: {candidate.reason}")

with torch.inference_mode():
    for tokens in (0, 1, 33, 500):  # any number of tokens is allowed
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
print("equal to eager for 0, 1, 33 and 500 tokens")

small = {"width": 16, "hidden": 24, "experts": 4}
counted, listed = Counted(**small).eval(), Listed(**small).eval()
described = moec.describe(Listed, forward=listed_in_pytorch)
x = torch.randn(12, 16)
for way, module, descriptions in (
    ("speculated", counted, ()),
    ("described", listed, (described,)),
):
    compiled = moec.compile(module, (x,), descriptions=descriptions)
    (block,) = compiled.blocks
    print(f"{way}: {type(module).__name__}, top-{block.top_k} of {block.experts}, {block.router}")
    for note in compiled.captured.notes:
        print(f"  {note}")
    with torch.inference_mode():
        x = torch.randn(77, 16)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-5)
