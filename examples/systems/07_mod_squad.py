"""7. Mod-Squad: a vision transformer for several tasks, where each task uses its own experts.

Multi-task heterogeneous training (arXiv 2306.17165), with the layers of Mod-Squad (2212.08066):
even blocks have a mixture of attention heads (an expert is a query and an output projection; keys
and values are shared), odd blocks a mixture of MLPs. Each task has its own gate in each layer. A
loss on the mutual information of tasks and experts makes each task use few experts, so that the
part for one task can be extracted from the trained model.

    python examples/systems/07_mod_squad.py               # small, compiled, one task cut out
    python examples/systems/07_mod_squad.py --published   # parameters at the authors' base size
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
from moec.passes.specialise.specialise import Specialise


@dataclass(frozen=True)
class Config:
    """The base configuration: 12 of 24 heads of width 128, and 4 of 16 MLPs."""

    blocks: int = 12
    width: int = 768
    head: int = 128
    heads: int = 24
    top_heads: int = 12
    hidden: int = 768
    mlps: int = 16
    top_mlps: int = 4
    tasks: int = 14
    patch: int = 16
    channels: int = 3
    side: int = 224
    classes: int = 5

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


SMALL = Config(2, 16, 8, 3, 2, 16, 3, 2, tasks=2, patch=4, channels=1, side=8)
PUBLISHED = {"base": (Config(), 195.8)}
CLASSES = {"class_object": 1000, "class_scene": 365}
# Taskonomy's maps that the authors train on, with the number of channels per pixel.
MAPS = {
    "depth_euclidean": 1,
    "depth_zbuffer": 1,
    "edge_occlusion": 1,
    "edge_texture": 1,
    "keypoints2d": 1,
    "keypoints3d": 1,
    "normal": 3,
    "principal_curvature": 2,
    "reshading": 3,
    "segment_semantic": 18,
    "segment_unsup2d": 1,
    "segment_unsup25d": 1,
}


class Gate(nn.Module):
    """x [T, D], a task [] -> probabilities [T, N]: one linear gate without bias per task."""

    def __init__(self, config: Config, experts: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(config.tasks, experts, config.width))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return F.linear(x, self.weights[task]).softmax(-1)


class MoEAttention(nn.Module):
    """x [B, S, D], task -> [B, S, D]: each token chooses its heads; all share keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gate = Gate(config, config.heads)
        self.query = nn.Parameter(torch.randn(config.heads, config.head, config.width) / 10)
        self.out = nn.Parameter(torch.randn(config.heads, config.width, config.head) / 10)
        self.key = nn.Linear(config.width, config.head, bias=False)
        self.value = nn.Linear(config.width, config.head, bias=False)
        self.probabilities = torch.zeros(0)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        probabilities = self.gate(rows, task)
        if self.training:
            self.probabilities = probabilities
        weights, chosen = probabilities.topk(self.config.top_heads, dim=-1)
        q = torch.einsum("td,tkhd->tkh", rows, self.query[chosen])  # the chosen heads' queries
        q = q.unflatten(0, x.shape[:2]).transpose(1, 2)  # [B, k, S, h]
        k, v = self.key(x)[:, None], self.value(x)[:, None]
        y = (q @ k.transpose(-1, -2) / self.config.head**0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(0, 1)  # [T, k, h]
        y = torch.einsum("tkh,tkdh->tkd", y, self.out[chosen])
        return (y * weights[..., None]).sum(1).view_as(x)


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MoEMLP(nn.Module):
    """x [B, S, D], task -> [B, S, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k = config.top_mlps
        self.gate = Gate(config, config.mlps)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.mlps))
        self.probabilities = torch.zeros(0)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        probabilities = self.gate(rows, task)
        if self.training:
            self.probabilities = probabilities
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == index)
            y.index_add_(0, tokens, expert(rows[tokens]) * weights[tokens, slots, None])
        return y.view_as(x)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.width // config.head
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP; in even blocks attention is a mixture, in odd blocks the MLP is."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.even = index % 2 == 0
        if self.even:
            self.attention: nn.Module = MoEAttention(config)
            self.mlp: nn.Module = nn.Sequential(
                nn.Linear(config.width, 4 * config.width),
                nn.GELU(),
                nn.Linear(4 * config.width, config.width),
            )
        else:
            self.attention, self.mlp = Attention(config), MoEMLP(config)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        if self.even:
            x = x + self.attention(self.norm1(x), task)
            return x + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x), task)


class MultiTask(nn.Module):
    """Images [B, C, h, w], a task [] -> logits [B, classes], with one head for all tasks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.positions = nn.Parameter(torch.randn(1, config.patches, config.width) * 0.02)
        self.tasks = nn.Parameter(torch.randn(config.tasks, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.blocks))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor, task: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x + self.tasks[task], task)
        return self.head(self.norm(x).mean(1))


class Heads(nn.Module):
    """The heads of the authors' model for Taskonomy's 14 tasks: features [B, S, D] -> classes of an
    image [B, n], or the pixels of a map, per patch [B, S, patch * patch * channels]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        pixels = config.patch**2
        self.classes = nn.ModuleDict(
            {
                task: nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, count))
                for task, count in CLASSES.items()
            }
        )
        self.maps = nn.ModuleDict(
            {task: nn.Linear(config.width, pixels * count) for task, count in MAPS.items()}
        )

    def forward(self, x: Tensor, task: str) -> Tensor:
        if task in self.classes:
            return self.classes[task](x.mean(1))
        return self.maps[task](x)


def mutual_information(model: nn.Module, images: Tensor) -> Tensor:
    """I(task; expert) in nats, summed over the layers, for a model in training mode: the sum over
    tasks and experts of P(t, e) log(P(t, e) / (P(t) P(e))). Training adds -0.005 times it to the
    loss."""
    layers = [m for m in model.modules() if isinstance(m, MoEAttention | MoEMLP)]
    tasks = layers[0].gate.weights.shape[0]
    shares: list[list[Tensor]] = []
    for task in range(tasks):
        model(images, torch.tensor(task))
        shares.append([layer.probabilities.mean(0) / tasks for layer in layers])
    total = torch.zeros(())
    for layer_shares in zip(*shares, strict=True):
        joint = torch.stack(layer_shares)  # P(t, e)
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        total = total + (joint * (joint / independent).log()).sum()
    return total


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of two blocks with random weights, and example inputs."""
    return MultiTask(SMALL).eval(), (torch.randn(2, 1, 8, 8), torch.tensor(1))


class Layer(nn.Module):
    """The mixture of MLPs for one task: x [B, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MoEMLP(Config())
        self.register_buffer("task", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x, self.task)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A mixture of MLPs of the base model over 196 patches, for benchmarks/systems."""
    return Layer().eval(), (torch.randn(1, 196, Config.width),)


def published(name: str) -> int:
    """The number of parameters with the heads of all tasks instead of the common one."""
    config, _ = PUBLISHED[name]
    with torch.device("meta"):
        model = MultiTask(config)
        model.head = Heads(config)
    return sum(p.numel() for p in model.parameters())


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
            print(f"{name}: {published(name) / 1e6:.1f}M parameters, the authors' {paper}M")
        return
    torch.manual_seed(0)
    model, inputs = small()
    compiled = moec.compile(model, inputs, passes=[Specialise({"task": 1})])
    for block in compiled.blocks:
        print(f"{block.name}: {block.router}; {block.experts} {block.activation} experts")
    with torch.inference_mode():
        error = (compiled(inputs[0]) - model(*inputs)).abs().max()
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs[:1])
    print(f"task 1 alone: greatest difference to eager: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print("the authors' base configuration: 195.8M parameters; --published")


if __name__ == "__main__":
    main()
