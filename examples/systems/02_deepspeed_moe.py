"""2. DeepSpeed-MoE: residual experts in a pyramid, gated by einsums (arXiv 2201.05596).

A GPT in which every other layer has experts, y = c0 * MoE(x) + c1 * MLP(x) with c = softmax(W x +
b). Deeper layers have more experts (PR-MoE). The gate is written as in the authors' code: one-hot
masks [S, E], slots by a cumulative sum, dispatch and combine as einsums over [S, E, C]. An expert
takes C tokens. With top-1, they are chosen at random (random token selection); the random numbers
are an input here, so that results are reproducible. A student with fewer layers is distilled from
the model (MoS).

    python examples/systems/02_deepspeed_moe.py               # small, compiled, beside eager
    python examples/systems/02_deepspeed_moe.py --published   # parameters at the paper's sizes
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


@dataclass(frozen=True)
class Config:
    """`experts` has the number of experts of each MoE layer (every other layer, from the second
    on)."""

    layers: int = 24
    width: int = 2048
    heads: int = 16
    experts: tuple[int, ...] = (128,) * 12
    top_k: int = 1
    residual: bool = False
    factor: float = 1.0
    least: int = 4  # the smallest capacity
    vocabulary: int = 51200
    context: int = 2048


SMALL = Config(2, 16, 2, (4,), 1, True, 1.5, least=1, vocabulary=40, context=16)
# Parameters in billions; the pyramid of 1.3B + PR-MoE is 10 layers of 64 and 2 of 128.
PUBLISHED = {
    "1.3B + MoE-128": (Config(), 52.0),
    "1.3B + PR-MoE-64/128": (Config(experts=(64,) * 10 + (128,) * 2, residual=True), 31.0),
    "350M + MoE-128": (Config(width=1024), 13.0),
    "350M + PR-MoE-32/64": (Config(width=1024, experts=(32,) * 10 + (64,) * 2, residual=True), 4.0),
}


def capacity(tokens: int, experts: int, factor: float, least: int) -> int:
    """C = max(ceil(T / N * factor), least)."""
    return max(math.ceil(tokens / experts * factor), least)


def top1_gate(logits: Tensor, size: int, noise: Tensor | None) -> Tensor:
    """logits [S, E] -> combine weights [S, E, C]. `noise` [S, E] in [0, 1) determines which tokens
    an expert keeps; None keeps the first ones."""
    gates = F.softmax(logits, dim=1)
    mask = F.one_hot(torch.argmax(gates, dim=1), logits.shape[1])
    if noise is not None:
        best = torch.topk(mask * noise, k=size, dim=0)[1]
        mask = mask * torch.zeros_like(mask).scatter_(0, best, 1)
    locations = torch.cumsum(mask, dim=0) - 1
    mask = mask * torch.lt(locations, size)
    slots = F.one_hot(torch.sum(locations * mask, dim=1), size).to(logits.dtype)
    return torch.einsum("se,sc->sec", gates * mask.to(logits.dtype), slots)


def top2_gate(logits: Tensor, size: int) -> Tensor:
    """logits [S, E] -> combine weights [S, E, C]: the two best, renormalised. Second choices take
    the slots after those of all first choices."""
    gates = F.softmax(logits, dim=1)
    mask1 = F.one_hot(torch.argmax(gates, dim=1), logits.shape[1])
    rest = logits.masked_fill(mask1.bool(), float("-inf"))
    mask2 = F.one_hot(torch.argmax(rest, dim=1), logits.shape[1])
    locations1 = torch.cumsum(mask1, dim=0) - 1
    locations2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
    mask1 = mask1 * torch.lt(locations1, size)
    mask2 = mask2 * torch.lt(locations2, size)
    slots1 = F.one_hot(torch.sum(locations1 * mask1, dim=1), size).to(logits.dtype)
    slots2 = F.one_hot(torch.sum(locations2 * mask2, dim=1), size).to(logits.dtype)
    gates1 = torch.einsum("se,se->s", gates, mask1.to(logits.dtype))
    gates2 = torch.einsum("se,se->s", gates, mask2.to(logits.dtype))
    total = torch.clamp(gates1 + gates2, min=torch.finfo(logits.dtype).eps)
    first = torch.einsum("s,se->se", gates1 / total, mask1.to(logits.dtype))
    second = torch.einsum("s,se->se", gates2 / total, mask2.to(logits.dtype))
    return torch.einsum("se,sc->sec", first, slots1) + torch.einsum("se,sc->sec", second, slots2)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MoE(nn.Module):
    """x [B, S, D], noise [B * S, E]? -> [B, S, D]."""

    def __init__(self, config: Config, experts: int) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(MLP(width) for _ in range(experts))
        self.loss = torch.zeros(())

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        c, rows = self.config, x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        size = capacity(len(rows), len(self.experts), c.top_k * c.factor, c.least)
        if self.training:
            self.loss = balance_loss(logits)
        combine = top1_gate(logits, size, noise) if c.top_k == 1 else top2_gate(logits, size)
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().to(rows.dtype), rows)
        outputs = torch.stack([expert(dispatched[i]) for i, expert in enumerate(self.experts)])
        return torch.einsum("sec,ecm->sm", combine, outputs).view_as(x)


class ResidualMoE(nn.Module):
    """c0 * MoE(x) + c1 * MLP(x), c = softmax(W x + b)."""

    def __init__(self, config: Config, experts: int) -> None:
        super().__init__()
        self.moe, self.mlp = MoE(config, experts), MLP(config.width)
        self.coefficient = nn.Linear(config.width, 2)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        c = self.coefficient(x).softmax(-1)
        return self.moe(x, noise) * c[..., :1] + self.mlp(x) * c[..., 1:]


def balance_loss(logits: Tensor) -> Tensor:
    """N times the sum over experts of (mean probability) * (share of the first choices)."""
    gates = logits.softmax(-1)
    share = F.one_hot(gates.argmax(-1), logits.shape[-1]).float().mean(0)
    return logits.shape[-1] * (gates.mean(0) * share).sum()


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: Config, experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.routed = experts > 0
        layer = ResidualMoE if config.residual else MoE
        self.ffn: nn.Module = layer(config, experts) if experts else MLP(config.width)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + (self.ffn(y, noise) if self.routed else self.ffn(y))


class GPT(nn.Module):
    """Token ids [B, S], noise [B * S, E] per MoE layer ... -> logits [B, S, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        experts = [0 if i % 2 == 0 else config.experts[i // 2] for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, count) for count in experts)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, *noise: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        numbers = iter(noise)
        for block in self.blocks:
            x = block(x, next(numbers, None)) if block.routed else block(x)
        return F.linear(self.norm(x), self.embedding.weight)


@dataclass(frozen=True)
class StagedDistillation:
    """Staged distillation into a model of fewer layers (Mixture-of-Students, section 4.2): a
    student that follows its teacher to the end is too small for both objectives.

    Cross entropy + `alpha` KL(teacher | student); from step `stop` on, the cross entropy alone.
    Raises ValueError for a negative `alpha` or `stop`."""

    alpha: float
    stop: int

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.stop < 0:
            raise ValueError(
                f"StagedDistillation(alpha={self.alpha}, stop={self.stop}): both must be 0 or more"
            )

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The loss of logits [.., V] of both models for the targets [..], a mean over tokens in
        nats. The teacher gets no gradient."""
        classes = student.flatten(0, -2)
        loss = F.cross_entropy(classes, targets.flatten())
        if step >= self.stop:
            return loss
        aims = teacher.detach().flatten(0, -2).softmax(-1)
        return loss + self.alpha * F.kl_div(classes.log_softmax(-1), aims, reduction="batchmean")


def distill(student: GPT, teacher: GPT, ids: Tensor, steps: int, stop: int) -> list[float]:
    """Trains a student with fewer layers on one batch [B, S], until step `stop` also on the
    teacher's logits (MoS). Returns its cross entropies."""
    loss = StagedDistillation(1.0, stop)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    targets = ids[:, 1:]
    with torch.no_grad():
        aims = teacher.eval()(ids[:, :-1])
    student.train()
    losses = []
    for step in range(steps):
        logits = student(ids[:, :-1])
        losses.append(float(F.cross_entropy(logits.detach().flatten(0, 1), targets.flatten())))
        optimizer.zero_grad()
        loss(logits, aims, targets, step).backward()
        optimizer.step()
    student.eval()
    return losses


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A GPT of two layers with a residual MoE layer and random weights; experts keep their first
    tokens."""
    return GPT(SMALL).eval(), (torch.randint(SMALL.vocabulary, (2, 9)),)


def one_layer(top_k: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An MoE layer: top-1 with random token selection, whose numbers are an input, or top-2."""
    module = MoE(replace(SMALL, top_k=top_k, factor=1.0), 4).eval()
    x = torch.randn(1, 33, SMALL.width)
    return module, (x, torch.rand(33, 4)) if top_k == 1 else (x,)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A top-2 layer of 16 experts of the 350M model over 512 tokens, for benchmarks/systems."""
    return MoE(Config(width=1024, top_k=2), 16).eval(), (torch.randn(1, 512, 1024),)


@functools.cache
def published(name: str) -> tuple[int, int]:
    """The number of all parameters at a size of the paper, and of those that a token uses."""
    config = PUBLISHED[name][0]
    with torch.device("meta"):
        total = sum(p.numel() for p in GPT(config).parameters())
        expert = sum(p.numel() for p in MLP(config.width).parameters())
    return total, total - (sum(config.experts) - config.top_k * len(config.experts)) * expert


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
                f"{name}: {total / 1e9:.1f}B parameters, {active / 1e9:.2f}B active; paper {paper}B"
            )
        return
    torch.manual_seed(0)
    model, inputs = small()
    compiled = moec.compile(model, inputs, kv_cache=False)
    for block in compiled.blocks:
        print(f"{block.name}: {block.router}; {block.experts} experts; {block.form}")
    with torch.inference_mode():
        error = (compiled(*inputs) - model(*inputs)).abs().max()
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
    print(f"greatest difference to eager: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print(
        "the paper: up to 7.3 times the speed of a PyTorch baseline, on 128 and more GPUs (Fig. 11)"
    )


if __name__ == "__main__":
    main()
