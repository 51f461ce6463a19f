"""6. MoE++: experts with and without a network (arXiv 2410.07348).

A language model whose MoE layers choose two of N experts: N_F are feed-forward networks, the others
are a zero expert (0), a copy expert (x) and constant experts (a mix of x and a vector). The router
of a layer also reads the scores of the previous layer (gating residuals). There are two forms: that
of the paper, and that of the authors' published code, which differs in router, weights and input
scale.

    python examples/systems/06_moe_plus_plus.py               # small, compiled, compared with eager
    python examples/systems/06_moe_plus_plus.py --published   # parameters at the paper's sizes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec

TOP_K = 2


@dataclass(frozen=True)
class Config:
    """`published_code` selects the layer of the authors' repository instead of the paper's."""

    layers: int = 12
    width: int = 768
    hidden: int = 2048
    heads: int = 12
    networks: int = 8
    constants: int = 2
    vocabulary: int = 65536
    published_code: bool = False

    @property
    def experts(self) -> int:
        """The number of all experts that a token may choose: networks, constants, one copy, one
        zero."""
        return self.networks + self.constants + 2


SMALL = Config(layers=2, width=32, hidden=64, heads=4, networks=3, vocabulary=128)
# Table 2 of the paper; the names of the models are their parameter counts.
PUBLISHED = {
    "0.6B/(8+4)": (Config(), "0.6B"),
    "1B/(16+4)": (Config(networks=16), "1B"),
    "2B/(32+8)": (Config(networks=32, constants=6), "2B"),
    "7B/(16+4)": (Config(24, 1536, 4096, 16, 16), "7B"),
}


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Constant(nn.Module):
    """Equation 5: a x + b v, with (a, b) = softmax(W x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mix = nn.Linear(config.width, 2, bias=False)
        self.vector = nn.Parameter(torch.randn(config.width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mix(x).softmax(-1)
        return weight[:, :1] * x + weight[:, 1:] * self.vector


class Copy(nn.Module):
    """Equation 4: x."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """Equation 3: 0."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Router(nn.Module):
    """x [T, D], scores of the previous layer [T, N] -> scores [T, N]: equation 6."""

    def __init__(self, config: Config, first: bool) -> None:
        super().__init__()
        count = config.experts
        if config.published_code:
            self.score: nn.Module = nn.Sequential(
                nn.Linear(config.width, 8 * count, bias=False),
                nn.Tanh(),
                nn.Linear(8 * count, count, bias=False),
            )
        else:
            self.score = nn.Linear(config.width, count, bias=False)
        self.residual = None if first else nn.Linear(count, count, bias=False)

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        logits = self.score(x)
        if self.residual is not None:
            logits = logits + self.residual(before)
        return logits


class MoE(nn.Module):
    """x [T, D], previous scores [T, N] -> y [T, D], scores [T, N]. The order of experts is that of
    the code: networks, constants, copy, zero."""

    def __init__(self, config: Config, first: bool) -> None:
        super().__init__()
        self.router = Router(config, first)
        self.experts = nn.ModuleList(
            [
                *(FeedForward(config) for _ in range(config.networks)),
                *(Constant(config) for _ in range(config.constants)),
                Copy(),
                Zero(),
            ]
        )
        self.published_code = config.published_code

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.router(x, before)
        weights, chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
        if self.published_code:
            # The zero expert is not included in the sum that the weights are divided by.
            weights = torch.where(chosen == len(self.experts) - 1, 0.0, weights)
            weights = weights / weights.sum(-1, keepdim=True)
            x = x * TOP_K
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            rows = expert(x[tokens]) * weights[tokens, slots, None]
            y.index_add_(0, tokens, rows)
        return y, logits


def rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding of x [B, heads, S, d]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config: Config, first: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.width, 1e-6), nn.RMSNorm(config.width, 1e-6)
        self.attention = Attention(config)
        self.moe = MoE(config, first)

    def forward(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm1(x))
        y, scores = self.moe(self.norm2(x).flatten(0, 1), scores)
        return x + y.view_as(x), scores


class MoEPlusPlus(nn.Module):
    """Token ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, index == 0) for index in range(config.layers))
        self.norm = nn.RMSNorm(config.width, 1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        scores: Tensor | None = None
        for block in self.blocks:
            x, scores = block(x, scores)
        return self.head(self.norm(x))


def small(published_code: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of a few layers with random weights, and example inputs."""
    config = replace(SMALL, published_code=published_code)
    return MoEPlusPlus(config).eval(), (torch.randint(config.vocabulary, (2, 17)),)


class Layer(nn.Module):
    """One MoE layer of the 1B model: x [T, D] -> y [T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(Config(networks=16), first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x, None)[0]


def layer(tokens: int = 512) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer at the paper's size, for benchmarks/systems."""
    return Layer().eval(), (torch.randn(tokens, Config.width),)


def parameters(model: nn.Module) -> tuple[int, int]:
    """The number of all parameters, and the most that one token can use (two networks per
    layer)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for moe in (m for m in model.modules() if isinstance(m, MoE)):
        networks = [e for e in moe.experts if isinstance(e, FeedForward)]
        one = sum(p.numel() for p in networks[0].parameters())
        idle += one * (len(networks) - TOP_K)
    return total, total - idle


def published(name: str) -> tuple[int, int]:
    """Parameters at a size of the paper, counted without allocating them."""
    with torch.device("meta"):
        return parameters(MoEPlusPlus(PUBLISHED[name][0]))


def milliseconds(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """The least time of 20 calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", action="store_true", help="count the published sizes")
    if parser.parse_args(arguments).published:
        for name, (_, paper) in PUBLISHED.items():
            total, active = published(name)
            print(
                f"{name}: {total / 1e9:.3f}B parameters, paper {paper}; {active / 1e9:.3f}B active"
            )
        return
    torch.manual_seed(0)
    for published_code in (False, True):
        model, inputs = small(published_code)
        compiled = moec.compile(model, inputs)
        print("as in the authors' code:" if published_code else "as in the paper:")
        for block in compiled.blocks:
            print(
                f"  {block.name}: {block.router}; {block.experts} {block.activation}, {block.zero}"
            )
        with torch.inference_mode():
            error = (compiled(*inputs) - model(*inputs)).abs().max()
            eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
        print(f"  greatest difference to eager: {error:.1e}")
        print(f"  eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print("the paper: 1.15 to 2.64 times the expert throughput of a MoE of equal size (Table 3);")
    print("benchmarks/layers/zero_experts.py measures the same ratio for compiled layers")


if __name__ == "__main__":
    main()
