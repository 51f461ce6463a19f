"""1. MomentumSMoE: a state that is passed from MoE layer to MoE layer (arXiv 2410.14574).

The output of an SMoE layer is treated as a step of gradient descent, and momentum is added to the
steps of the layers: heavy ball, Adam (in the first layer, as in the authors' code; heavy ball in
the others), or robust momentum. The state is passed through layers, never between tokens.

    python examples/systems/01_momentum_smoe.py               # small, compiled, compared with eager
    python examples/systems/01_momentum_smoe.py --published   # parameters at the authors' sizes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec

TOP_K = 2
Method = Literal["plain", "heavy ball", "adam", "robust"]
State = tuple[Tensor, ...]
"""The state between layers: (m,), or (m, p, v) after an Adam layer. [B, S, D] each."""


@dataclass(frozen=True)
class Config:
    """The defaults are the medium model of the authors' scripts."""

    layers: int = 6
    width: int = 352
    heads: int = 8
    experts: int = 16
    vocabulary: int = 267735
    context: int = 512
    method: Method = "heavy ball"
    mu: float = 0.7
    gamma1: float = 1.0
    gamma2: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    kappa: float = 2.0  # robust momentum: the assumed condition number
    rho: float = 0.6  # and the requested rate of convergence


SMALL = Config(layers=6, width=16, heads=2, experts=3, vocabulary=50, context=32)
MEDIUM, LARGE = Config(), Config(layers=12, width=512, context=1024)
PUBLISHED = {"medium": MEDIUM, "large": LARGE}


class Expert(nn.Module):
    """A network of two layers; the hidden width equals the model's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class SMoE(nn.Module):
    """x [B, S, D] -> u [B, S, D]: the two best experts, weighted by a softmax over their two
    logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.loss = torch.zeros(())  # of the last call in training
        self.gate = nn.Linear(config.width, config.experts)
        self.experts = nn.ModuleList(Expert(config.width) for _ in range(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        logits = self.gate(rows)
        scores, chosen = logits.topk(TOP_K, dim=-1)
        if self.training:
            self.loss = balance_loss(logits, chosen)
        weights = scores.softmax(-1)
        u = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            u.index_add_(0, tokens, expert(rows[tokens]) * weights[tokens, slots, None])
        return u.view_as(x)


class MomentumLayer(nn.Module):
    """x and the state of the previous layer -> y and the new state; [B, S, D] each."""

    def __init__(self, config: Config, method: Method) -> None:
        super().__init__()
        self.config, self.method = config, method
        self.smoe, self.norm = SMoE(config), nn.LayerNorm(config.width)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        c, m = self.config, state[0]
        if self.method == "plain":
            return self.norm(x - self.smoe(x)), state
        if self.method == "robust":
            # Cyrus, Hu, Van Scoy and Lessard 2018: the gradient is evaluated at a point ahead of
            # the step.
            cube = c.rho**3
            ahead = cube / ((c.kappa - 1) * (1 - c.rho) ** 2 * (1 + c.rho))
            alpha = c.kappa * (1 - c.rho) ** 2 * (1 + c.rho)
            beta = c.kappa * cube / (c.kappa - 1)
            m = beta * m + alpha * self.smoe(x - ahead * m)
            return self.norm(x - m), (m,)
        u = self.smoe(x)
        m = c.mu * m + c.gamma2 * u
        if self.method == "heavy ball":
            return self.norm(x - m), (m,)
        p, v = state[1], state[2]
        p = c.beta1 * p + (1 - c.beta1) * u
        v = c.beta2 * v + (1 - c.beta2) * u * u
        y = self.norm(x - (x + c.gamma1 * p / (v + 1e-8).sqrt()))
        return y, (m, p, v)


class Attention(nn.Module):
    """Causal self-attention of x [B, S, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in self.projections())
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q, self.k, self.v


class Block(nn.Module):
    """ "sm" of the authors' stacks: attention and a momentum layer ("sa": with Adam), post-norm."""

    def __init__(self, config: Config, method: Method) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(config), nn.LayerNorm(config.width)
        self.moe, self.norm2 = MomentumLayer(config, method), nn.LayerNorm(config.width)

    def forward(self, h: Tensor, state: State) -> tuple[Tensor, State]:
        h = self.norm1(h + self.attention(h))
        y, state = self.moe(h, state)
        return self.norm2(h + y), state


class MomentumSMoE(nn.Module):
    """Token ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        methods: list[Method] = [config.method] * config.layers
        if config.method == "adam":
            methods[1:] = ["heavy ball"] * (config.layers - 1)
        self.adam = config.method == "adam"
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, method) for method in methods)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        state: State = (torch.zeros_like(h),) * (3 if self.adam else 1)
        for block in self.blocks:
            h, state = block(h, state)
        return self.head(h)


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """N * sum over i of (share of the choices of expert i) * (mean probability of expert i)."""
    count = logits.shape[-1]
    share = F.one_hot(chosen, count).float().mean((0, 1))
    return count * (share * logits.softmax(-1).mean(0)).sum()


def train(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """Next-token losses [steps] on one batch of ids [B, S]; the balance loss is added (times
    0.01)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        loss = loss + 0.01 * sum(m.loss for m in model.modules() if isinstance(m, SMoE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


def small(method: Method = "heavy ball") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of a few layers with random weights, and example inputs."""
    config = replace(SMALL, method=method, layers=SMALL.layers if method == "heavy ball" else 2)
    return MomentumSMoE(config).eval(), (torch.randint(config.vocabulary, (2, 9)),)


class Layer(nn.Module):
    """One momentum layer of the medium model: x, m [B, S, D] -> y, m."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MomentumLayer(MEDIUM, "heavy ball")

    def forward(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        y, (m,) = self.layer(x, (m,))
        return y, m


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A layer at the authors' size, for benchmarks/systems."""
    return Layer().eval(), tuple(torch.randn(1, MEDIUM.context, MEDIUM.width) for _ in range(2))


def published(name: str) -> tuple[int, int]:
    """The number of all parameters at a size of the authors' scripts, and of those that a token
    uses."""
    with torch.device("meta"):
        model = MomentumSMoE(PUBLISHED[name])
    total = sum(p.numel() for p in model.parameters())
    expert = sum(p.numel() for p in Expert(PUBLISHED[name].width).parameters())
    return total, total - PUBLISHED[name].layers * (PUBLISHED[name].experts - TOP_K) * expert


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
        for name in PUBLISHED:
            total, active = published(name)
            print(f"{name}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active")
        return
    torch.manual_seed(0)
    model, inputs = small()
    compiled = moec.compile(model, inputs, kv_cache=False)
    for block in compiled.blocks:
        print(f"{block.name}: {block.router}; {block.experts} {block.activation} experts")
    with torch.inference_mode():
        error = (compiled(*inputs) - model(*inputs)).abs().max()
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
    print(f"greatest difference to eager: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print(
        "the paper: perplexity on WikiText-103 (test) 35.55 -> 33.46, with Adam 33.25, by training"
    )


if __name__ == "__main__":
    main()
