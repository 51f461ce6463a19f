"""3. Uni-MoE: a language model for several modalities with mixtures of experts (arXiv 2405.11273).

Connectors turn features of images (or of the frames of a video) and of audio into tokens, which
precede the text. Each layer's FFN is an MoE layer: the top-2 logits, with a softmax over the two.
An expert is a frozen FFN that was trained for one modality, with low-rank adapters (LoRA).

    python examples/systems/03_uni_moe.py               # small, compiled, compared with eager
    python examples/systems/03_uni_moe.py --published   # parameters of Table 1
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
    """The defaults are Vicuna-7B; every `interval`-th layer has experts. An adapter is scaled by
    `alpha` / `rank`; rank 0 means no adapters. `image` and `audio` are the widths of the encoders'
    features."""

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    experts: int = 4
    interval: int = 2
    rank: int = 8
    alpha: int = 16
    image: int = 1024
    audio: int = 768
    queries: int = 32


SMALL = Config(
    2, 32, 48, 4, 60, experts=3, interval=1, rank=2, alpha=4, image=12, audio=10, queries=3
)
# Table 1: total and active parameters, in billions.
PUBLISHED = {
    "7B x 4, 16 MoE layers": (Config(), 13.2, 8.9),
    "7B x 4, 32 MoE layers": (Config(interval=1), 19.7, 11.1),
    "7B x 8, 16 MoE layers": (Config(experts=8), 21.9, 8.9),
    "7B x 8, 32 MoE layers": (Config(experts=8, interval=1), 37.0, 11.1),
}


class LoraLinear(nn.Module):
    """W x + alpha / rank * B A x."""

    def __init__(self, inside: int, outside: int, config: Config) -> None:
        super().__init__()
        self.base = nn.Linear(inside, outside, bias=False)
        self.adapted = config.rank > 0
        if self.adapted:
            self.a = nn.Linear(inside, config.rank, bias=False)
            self.b = nn.Linear(config.rank, outside, bias=False)
            self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.scale * self.b(self.a(x)) if self.adapted else y


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = LoraLinear(config.width, config.hidden, config)
        self.up = LoraLinear(config.width, config.hidden, config)
        self.down = LoraLinear(config.hidden, config.width, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, chosen = self.gate(rows).topk(TOP_K, dim=-1)
        weights = scores.softmax(-1)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            y.index_add_(0, tokens, expert(rows[tokens]) * weights[tokens, slots, None])
        return y.view_as(x)


def rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding of x [B, heads, S, d]."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * base ** (-torch.arange(half) / half)
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
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config, has_experts: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.width, 1e-5), nn.RMSNorm(config.width, 1e-5)
        self.attention = Attention(config)
        dense = replace(config, rank=0)
        self.ffn = MoE(config) if has_experts else FeedForward(dense)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class QFormer(nn.Module):
    """Features [B, A, F] of any length -> [B, queries, D], by attention from learned queries."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.queries, config.width))
        self.key, self.value = (nn.Linear(config.audio, config.width) for _ in range(2))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, features: Tensor) -> Tensor:
        queries = self.queries.expand(features.shape[0], -1, -1)
        weights = queries @ self.key(features).transpose(1, 2) / queries.shape[-1] ** 0.5
        return self.out(weights.softmax(-1) @ self.value(features))


class LanguageModel(nn.Module):
    """Embedded tokens [B, S, D] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(
            Block(config, (index + 1) % config.interval == 0) for index in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.width, 1e-5)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class UniMoE(nn.Module):
    """Text [B, S], image features [B, frames, P, F], audio features [B, A, F] -> logits of the
    text. A video is the mean of its frames, an image one frame.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(config.image, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.audio = QFormer(config)
        self.model = LanguageModel(config)

    def forward(self, ids: Tensor, frames: Tensor, audio: Tensor) -> Tensor:
        text = self.model.embedding(ids)
        tokens = torch.cat((self.image(frames.mean(1)), self.audio(audio), text), 1)
        return self.model(tokens)[:, -ids.shape[1] :]


def example_inputs(config: Config, batch: int, length: int, frames: int) -> tuple[Tensor, ...]:
    return (
        torch.randint(config.vocabulary, (batch, length)),
        torch.randn(batch, frames, 4, config.image),
        torch.randn(batch, 6, config.audio),
    )


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of two layers with random weights, and example inputs."""
    return UniMoE(SMALL).eval(), example_inputs(SMALL, 2, 5, 8)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An MoE layer over 64 tokens at half of Vicuna's width with merged adapters, for
    benchmarks/systems (the full width would need 4 GB)."""
    config = Config(width=2048, hidden=5504, rank=0)
    return MoE(config).eval(), (torch.randn(1, 64, config.width),)


def published(name: str) -> tuple[int, int]:
    """The number of all parameters of the language model, and of those that a token uses. Adapters,
    which are merged, and connectors are not counted."""
    config = replace(PUBLISHED[name][0], rank=0)
    with torch.device("meta"):
        total = sum(p.numel() for p in LanguageModel(config).parameters())
        expert = sum(p.numel() for p in FeedForward(config).parameters())
    idle = config.layers // config.interval * (config.experts - TOP_K) * expert
    return total, total - idle


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
        for name, (_, *paper) in PUBLISHED.items():
            total, active = (count / 1e9 for count in published(name))
            print(f"{name}: {total:.1f}B, {active:.1f}B active; paper {paper[0]}B, {paper[1]}B")
        return
    torch.manual_seed(0)
    model, inputs = small()
    compiled = moec.compile(model, inputs, passes="+fold-lora", kv_cache=False)
    for block in compiled.blocks:
        print(f"{block.name}: {block.router}; {block.experts} {block.activation} experts")
    print(*compiled.report().notes, sep="\n")
    with torch.inference_mode():
        error = (compiled(*inputs) - model(*inputs)).abs().max()
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
    print(f"greatest difference to eager, adapters not merged: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print("the paper: 13.2B parameters, 8.9B active for 7B x 4 with 16 MoE layers; --published")


if __name__ == "__main__":
    main()
