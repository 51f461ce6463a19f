"""8. GNT-MOVE: a generalisable NeRF transformer with mixtures of view experts (arXiv 2308.11793).

The model computes colours of rays from points along them. For each point, a view transformer
attends to the features of the source views (by their difference), and a ray transformer attends to
the other points of the ray. The feed-forward networks are MoE layers with a cosine gate and learned
temperatures, plus a permanent expert: out = (MoE(x) + FFN(x)) / 2.

    python examples/systems/08_gnt_move.py               # small, compiled, compared with eager
    python examples/systems/08_gnt_move.py --published   # parameters at the authors' depth
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


@dataclass(frozen=True)
class Config:
    """Widths of a point's features and of a source view's; `gate` is the width of the cosine
    gate."""

    depth: int = 8
    width: int = 64
    view_width: int = 35
    experts: int = 4
    top_k: int = 2
    noise: float = 1.0  # standard deviation, times N, of the gate's noise in training

    @property
    def gate(self) -> int:
        return max(self.experts // 2, 1)


SMALL = Config(depth=1, width=16, view_width=11)
PUBLISHED = {"depth 8": Config()}


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class CosineGate(nn.Module):
    """x [T, D] -> probabilities [T, N]: the cosine of a projection with one column per expert,
    divided by a learned temperature, with noise in training."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.project = nn.Linear(config.width, config.gate, bias=False)
        self.columns = nn.Parameter(torch.randn(config.gate, config.experts))
        self.temperature = nn.Parameter(torch.full((config.experts,), 0.5))
        self.noise = config.noise / config.experts

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.project(x), dim=-1)
        logits = z @ F.normalize(self.columns, dim=0)
        if self.training:
            logits = logits + self.noise * torch.randn_like(logits)
        return (logits / self.temperature).softmax(-1)


class ViewExperts(nn.Module):
    """x [..., D] -> [..., D]: (MoE(x) + permanent(x)) / 2. `loss` is cv² of importance and load."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = CosineGate(config)
        self.experts = nn.ModuleList(Expert(config.width) for _ in range(config.experts))
        self.permanent = Expert(config.width)
        self.loss = torch.zeros(())
        self.probabilities = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(rows)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.training:
            load = F.one_hot(chosen, len(self.experts)).sum((0, 1)).float()
            self.loss = squared_variation(probabilities.sum(0)) + squared_variation(load)
            self.probabilities = probabilities
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            y.index_add_(0, tokens, expert(rows[tokens]) * weights[tokens, slots, None])
        return ((y + self.permanent(rows)) / 2).view_as(x)


def squared_variation(x: Tensor) -> Tensor:
    """The squared coefficient of variation."""
    return x.var() / (x.mean() ** 2 + 1e-10)


def consistency_loss(gates: Tensor, others: Tensor, points: Tensor, other_points: Tensor) -> Tensor:
    """A loss that makes neighbouring rays choose the same experts at the same positions.

    `gates`, `others` [P, N] are the probabilities of the points [P, 3] of two rays. Each point is
    matched with the nearest point of the other ray; the divergences are weighted by
    softmax(-distance).
    """
    distance, nearest = torch.cdist(points, other_points).min(-1)
    weight = (-distance.clamp(1e-2, 1e4)).softmax(-1)
    divergence = F.kl_div(others[nearest].log(), gates, reduction="none").sum(-1)
    return (weight * divergence).sum()


class ViewAttention(nn.Module):
    """q [R, P, D] of points, features of views [R, P, V, D], directions [R, P, V, 4] -> [R, P, D].

    Attention by difference: a network scores k - q + position for each channel.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.position = nn.Sequential(
            nn.Linear(4, width // 8), nn.ReLU(), nn.Linear(width // 8, width)
        )
        self.score = nn.Sequential(
            nn.Linear(width, width // 8), nn.ReLU(), nn.Linear(width // 8, width)
        )
        self.out = nn.Linear(width, width)

    def forward(self, q: Tensor, views: Tensor, directions: Tensor) -> Tensor:
        position = self.position(directions)
        key = self.k(views)
        weights = self.score(key - self.q(q)[:, :, None] + position).softmax(-2)
        return self.out(((self.v(key) + position) * weights).sum(-2))


class RayAttention(nn.Module):
    """x [R, P, D] -> [R, P, D]: self-attention over the points of a ray."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Stage(nn.Module):
    """A view transformer and a ray transformer, each with an MoE layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(4))
        self.view, self.ray = ViewAttention(config.width), RayAttention(config.width)
        self.view_experts, self.ray_experts = ViewExperts(config), ViewExperts(config)

    def forward(self, x: Tensor, views: Tensor, directions: Tensor) -> Tensor:
        x = x + self.view(self.norms[0](x), views, directions)
        x = x + self.view_experts(self.norms[1](x))
        x = x + self.ray(self.norms[2](x))
        return x + self.ray_experts(self.norms[3](x))


class GNTMove(nn.Module):
    """Features of the source views [R, P, V, F], ray directions [R, P, V, 4] -> colours [R, 3]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(config.view_width, config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.width),
        )
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.depth))
        self.norm, self.colour = nn.LayerNorm(config.width), nn.Linear(config.width, 3)

    def forward(self, views: Tensor, directions: Tensor) -> Tensor:
        features = self.features(views)
        x = features.amax(2)
        for stage in self.stages:
            x = stage(x, features, directions)
        return self.colour(self.norm(x).mean(1))


def example_inputs(config: Config, rays: int, points: int, views: int) -> tuple[Tensor, ...]:
    return torch.randn(rays, points, views, config.view_width), torch.randn(rays, points, views, 4)


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of one stage with random weights, and example inputs."""
    return GNTMove(SMALL).eval(), example_inputs(SMALL, 3, 5, 2)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of one stage over 64 points of 32 rays, for benchmarks/systems."""
    return ViewExperts(Config()).eval(), (torch.randn(32, 64, Config.width),)


def published(name: str) -> tuple[int, int]:
    """The number of all parameters, and of those that a point uses."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        total = sum(p.numel() for p in GNTMove(config).parameters())
        expert = sum(p.numel() for p in Expert(config.width).parameters())
    return total, total - 2 * config.depth * (config.experts - config.top_k) * expert


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
            print(f"{name}: {total / 1e6:.2f}M parameters, {active / 1e6:.2f}M active")
        return
    torch.manual_seed(0)
    model, inputs = small()
    compiled = moec.compile(model, inputs)
    for block in compiled.blocks:
        print(f"{block.name}: {block.router}; {block.experts} experts; shared: {block.shared}")
    with torch.inference_mode():
        error = (compiled(*inputs) - model(*inputs)).abs().max()
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
    print(f"greatest difference to eager: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print("the paper's figures are image qualities; its tables were not at hand")


if __name__ == "__main__":
    main()
