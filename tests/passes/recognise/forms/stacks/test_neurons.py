"""Experts of one neuron, rows of two tables, are one node; look-alikes are not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from tests.passes.agreement import assert_agrees, programs_after
from tests.passes.forms import others

D, N, HEADS, K = 6, 4, 2, 3


class Peer(nn.Module):
    """Product keys of several heads; rows are multiplied by einsums."""

    def __init__(self, keys: int = N, k: int = K) -> None:
        super().__init__()
        self.query = nn.Linear(D, 2 * HEADS * D, bias=False)
        self.keys = nn.Parameter(torch.randn(2, HEADS, keys, D))
        self.inward, self.outward = nn.Embedding(keys**2, D), nn.Embedding(keys**2, D)
        self.k = k

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count, k = self.keys.shape[2], self.k
        query = self.query(x).unflatten(-1, (2, HEADS, D))
        scores = torch.einsum("bsphd,phnd->pbshn", query, self.keys)
        (best, other), (rows, columns) = scores.topk(min(k, count), -1)
        sums = (best[..., None] + other[..., None, :]).flatten(-2)
        ids = (rows[..., None] * count + columns[..., None, :]).flatten(-2)
        top, index = sums.topk(k, -1)
        return top.softmax(-1), ids.gather(-1, index)

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.choose(x)
        h = torch.einsum("bsd,bshkd->bshk", x, self.inward(ids))
        return torch.einsum("bshk,bshkd->bsd", F.gelu(h) * weights, self.outward(ids))


class ByHead(Peer):
    """Products by broadcasting, sigmoid weights, a sum over each head and then over the heads."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.choose(x)
        h = (self.inward.weight[ids] * x[:, :, None, None]).sum(-1)
        parts = (F.relu(h) * weights.sigmoid())[..., None] * self.outward.weight[ids]
        return parts.sum(3).sum(2)


class WeighedFirst(Peer):
    """The weights are inside the activation function."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.choose(x)
        h = torch.einsum("bsd,bshkd->bshk", x, self.inward(ids))
        return torch.einsum("bshk,bshkd->bsd", F.gelu(h * weights), self.outward(ids))


class Clamped(Peer):
    """The result is limited by the greatest of the token's neurons."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.choose(x)
        h = torch.einsum("bsd,bshkd->bshk", x, self.inward(ids))
        h = h - h.amax(-1, keepdim=True)
        return torch.einsum("bshk,bshkd->bsd", F.gelu(h) * weights, self.outward(ids))


class Average(Peer):
    """Both tables are read by the tokens: none of them gives rows back."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.choose(x)
        gate = torch.einsum("bsd,bshkd->bshk", x, self.inward(ids))
        up = torch.einsum("bsd,bshkd->bshk", x, self.outward(ids))
        return x * (F.silu(gate) * up * weights).sum((-2, -1))[..., None]


@cache
def compiled(kind: type[Peer], keys: int = N, k: int = K) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = kind(keys, k).eval()
    example = (torch.randn(2, 5, D),)
    return module, moec.compile(module, example, stop_after="expand-neurons")


def programs(steps: Any) -> list[Program]:
    return programs_after(steps, "recognise-experts", "expand-neurons")


@pytest.mark.parametrize(("kind", "function"), [(Peer, "gelu"), (ByHead, "relu")])
def test_one_node_and_back(kind: type[Peer], function: str) -> None:
    _, steps = compiled(kind)
    node, out = programs(steps)
    assert [op.name for op in node.graph.ops].count("moe.neurons") == 1
    assert not any(op.name == "moe.neurons" for op in out.graph.ops)
    (block,) = steps.blocks
    assert (block.experts, block.top_k, block.activation) == (N * N, HEADS * K, function)
    assert block.form == "experts of one neuron"
    text = print_graph(node.graph)
    assert print_graph(parse(text)) == text


@settings(max_examples=10, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 6), seed=st.integers(0, 99))
@pytest.mark.parametrize(
    ("kind", "keys", "k"), [(Peer, N, K), (ByHead, N, K), (Peer, 1, 1), (Peer, 2, 1)]
)
def test_any_size(kind: type[Peer], keys: int, k: int, batch: int, tokens: int, seed: int) -> None:
    """f32 sums of six products in another order."""
    module, steps = compiled(kind, keys, k)
    assert len(steps.blocks) == 1 or keys == 1
    x = torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))
    assert_agrees(module, programs(steps), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WeighedFirst, "the numbers differ by"),
        (Clamped, "its rows are not multiplied by tokens, weighted and summed"),
    ],
)
def test_look_alikes_are_declined(kind: type[Peer], reason: str) -> None:
    _, steps = compiled(kind)
    assert steps.blocks == ()
    assert any(
        line.reason.startswith(f"experts of one neuron: {reason}") for line in steps.declined
    )


def test_gates_are_no_experts() -> None:
    assert compiled(Average)[1].blocks == ()


def test_compiled() -> None:
    module, _ = compiled(Peer)
    model = moec.compile(module, (torch.randn(2, 5, D),), verify=False)
    for shape in ((2, 5), (1, 1), (3, 7)):
        x = torch.randn(*shape, D)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)


def test_rows_of_tokens() -> None:
    torch.manual_seed(0)
    module = others.ProductKeys().eval()
    x = torch.randn(7, 8)
    steps = moec.compile(module, (x,), stop_after="expand-neurons")
    (block,) = steps.blocks
    assert (block.experts, block.top_k, block.activation) == (25, 2, "gelu")
    with torch.no_grad():
        right = module(x)
    for program in programs(steps):
        torch.testing.assert_close(
            evaluate(program.graph, [x], program.weights)[0], right, rtol=1e-5, atol=1e-5
        )


def test_doge() -> None:
    """The layer of transformers, whose router mixes tokens: its view is two halves of them all."""
    doge = pytest.importorskip("transformers.models.doge.modeling_doge")
    config = doge.DogeConfig(
        hidden_size=16, intermediate_size=8, is_moe=True, num_experts=16, num_experts_per_tok=K
    )
    torch.manual_seed(0)
    layer = doge.DogeCDMoE(config).eval()
    steps = moec.compile(layer, (torch.randn(2, 5, 16),), stop_after="expand-neurons")
    (block,) = steps.blocks
    assert (block.experts, block.top_k, block.activation) == (16, K, "silu")
    for shape in ((2, 5), (1, 1), (3, 4)):
        x = torch.randn(*shape, 16)
        with torch.no_grad():
            right = layer(x)
        for program in programs(steps):
            for actual, theirs in zip(
                evaluate(program.graph, [x], program.weights), right, strict=True
            ):
                torch.testing.assert_close(actual, theirs, rtol=1e-5, atol=1e-5)
