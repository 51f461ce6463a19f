"""Loops that read their experts' counts, as DeepSeek writes them, and sizes without an expression.

A graph of theirs that moec does not take runs in PyTorch, with the reason in the statistics.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.dynamo import FallbackWarning, compiler
from moec.errors import CaptureError

D, E, K = 16, 4, 2


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.SiLU(), nn.Linear(8, D)) for _ in range(E)
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1, sorted=False)
        return weights, ids


class V3(Base):
    """inference/model.py of DeepSeek-V3."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        weights, ids = self.route(flat)
        y = torch.zeros_like(flat)
        counts = torch.bincount(ids.flatten(), minlength=E).tolist()
        for i in range(E):
            if counts[i] == 0:
                continue
            rows, top = torch.where(ids == i)
            y[rows] += self.experts[i](flat[rows]) * weights[rows, top, None]
        return y.view(x.shape)


class V3Sums(V3):
    """The counts are sums of a one-hot matrix."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        weights, ids = self.route(flat)
        y = torch.zeros_like(flat)
        counts = F.one_hot(ids, E).sum((0, 1)).tolist()
        for i in range(E):
            if counts[i]:
                rows, top = torch.where(ids == i)
                y[rows] += self.experts[i](flat[rows]) * weights[rows, top, None]
        return y.view(x.shape)


class V2(Base):
    """moe_infer of DeepSeek-V2 and DeepSeek-VL2."""

    skips = True

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        weights, ids = self.route(flat)
        counts = ids.new_zeros((ids.shape[0], E))
        counts.scatter_(1, ids, 1)
        order = ids.view(-1).argsort()
        rows = flat[order // ids.shape[1]]
        results, start = [], 0
        for i, count in enumerate(self.numbers(counts.sum(dim=0))):
            end = start + count
            if self.skips and count == 0:
                continue
            results.append(self.experts[i](rows[start:end]))
            start = end
        joined = torch.cat(results, dim=0) if len(results) else rows.new_empty(0)
        y = torch.empty_like(joined)
        y[order] = joined
        y = y.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1)
        return y.type(joined.dtype).view(x.shape)

    def numbers(self, counts: Tensor) -> Any:
        return counts.cpu().numpy()


class V2List(V2):
    def numbers(self, counts: Tensor) -> Any:
        return counts.tolist()


class V2All(V2):
    """Also experts without rows run."""

    skips = False


@pytest.mark.parametrize("kind", [V3, V3Sums, V2, V2List, V2All])
def test_a_loop_over_counts_runs_in_pytorch(kind: type[nn.Module]) -> None:
    model = moec.prepare(kind().eval())
    run = torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager"})
    # Also where a filter makes errors of warnings, as here: `strict` is for errors.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (5, 3):
            x = torch.randn(2, rows, D)
            torch.testing.assert_close(run(x), model(x))
    assert moec.stats().fallbacks


class Logarithm(Base):
    """A number of levels, of which the IR has no expression, beside a block."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        chosen = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        levels = torch.ones(int(math.log2(x.shape[0])) + 1, D)
        y = x + levels.cumsum(0).mean()
        return torch.stack([chosen[:, e, None] * self.experts[e](y) for e in range(E)]).sum(0)


def test_a_size_without_an_expression_stays_outside_of_the_block() -> None:
    model = Logarithm().eval()
    run = torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager"})
    with torch.no_grad():
        for rows in (5, 9):
            x = torch.randn(rows, D)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    stats = moec.stats()
    assert (stats.blocks, stats.fallbacks) == (1, ())


def test_a_graph_that_cannot_be_converted_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: Any) -> Any:
        raise CaptureError("the size f(T) cannot be kept")

    monkeypatch.setattr(compiler, "convert", refuse)
    model, x = Logarithm().eval(), torch.randn(5, D)
    run = torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager"})
    with torch.no_grad(), pytest.warns(FallbackWarning):
        torch.testing.assert_close(run(x), model(x))
    (fallback,) = moec.stats().fallbacks
    assert str(fallback) == "the graph: the size f(T) cannot be kept"
