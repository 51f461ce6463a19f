"""4. Experts Weights Averaging: a ViT trained as experts, deployed as a ViT (arXiv 2308.06093).

During training, each FFN is N experts, and its tokens are split evenly among them at random: no
router, no balance loss, no capacity. After each optimizer step, an expert takes a share of the
others: W_i <- (1 - b) W_i + b / (N - 1) * (the sum of the others). After training, each FFN is
replaced by the mean of its experts.

    python examples/systems/04_ewa_vit.py     # trained on digits for seconds, folded, compiled

`EWA` of examples/training/ewa.py does the same for any model; examples/10_ewa.py measures the
benefit.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

import moec


@dataclass(frozen=True)
class Config:
    """Images are 8 x 8. `share` is the rate b."""

    depth: int = 2
    width: int = 32
    hidden: int = 64
    heads: int = 2
    experts: int = 4
    share: float = 0.01


SMALL = Config()


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def partition(tokens: int, experts: int) -> Tensor:
    """Random scores [T, N], where each expert has the greatest score for T / N tokens."""
    order = torch.randperm(tokens)
    return F.one_hot(order * experts // tokens, experts).float()


class Experts(nn.Module):
    """x [T, D], scores [T, N] -> [T, D]: each token goes to the expert with the best score."""

    def __init__(self, ffn: FeedForward, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(count))

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        chosen = scores.argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == index)
            y.index_add_(0, tokens, expert(x[tokens]))
        return y

    @torch.no_grad()
    def share(self, rate: float) -> None:
        """One step of weight averaging. The mean over the experts does not change."""
        for weights in zip(*(expert.parameters() for expert in self.experts), strict=True):
            stack = torch.stack(weights)
            others = (stack.sum(0) - stack) / (len(weights) - 1)
            for weight, new in zip(weights, (1 - rate) * stack + rate * others, strict=True):
                weight.copy_(new)

    @torch.no_grad()
    def mean(self) -> FeedForward:
        """The FFN that is deployed."""
        ffn = copy.deepcopy(self.experts[0])
        for weight, *stack in zip(
            ffn.parameters(), *(expert.parameters() for expert in self.experts), strict=True
        ):
            weight.copy_(torch.stack(stack).mean(0))
        assert isinstance(ffn, FeedForward)
        return ffn


class Partitioned(nn.Module):
    """x [B, S, D] -> [B, S, D] during training: experts with a new random partition in each
    call."""

    def __init__(self, ffn: FeedForward, count: int) -> None:
        super().__init__()
        self.moe = Experts(ffn, count)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        return self.moe(rows, partition(len(rows), len(self.moe.experts))).view_as(x)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ffn: nn.Module = FeedForward(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images [B, 1, 8, 8] -> logits [B, 10]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, config.width, 2, 2)
        self.positions = nn.Parameter(torch.randn(16, config.width) / 50)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def with_experts(model: VisionTransformer, config: Config) -> VisionTransformer:
    """The model with experts in place of each FFN; all experts start as copies of it."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.ffn = Partitioned(block.ffn, config.experts)
    return model


def folded(model: VisionTransformer) -> VisionTransformer:
    """The plain ViT, where each FFN is the mean of its experts."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.ffn = block.ffn.moe.mean()
    return model.eval()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images and labels for training (even indices) and testing
    (odd)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    return images[::2], labels[::2], images[1::2], labels[1::2]


def train(
    model: VisionTransformer, images: Tensor, labels: Tensor, steps: int, rate: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for experts in (m for m in model.modules() if isinstance(m, Experts)):
            experts.share(rate)
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model(images).argmax(-1) == labels).float().mean())


def small() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of one FFN with random weights, tokens and a partition."""
    experts = Experts(FeedForward(SMALL.width, SMALL.hidden), SMALL.experts)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts.eval(), (torch.randn(16, SMALL.width), partition(16, SMALL.experts))


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of a ViT-S over an image's 196 patches, for benchmarks/systems."""
    experts = Experts(FeedForward(384, 1536), 4)
    return experts.eval(), (torch.randn(196, 384), partition(196, 4))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    start = VisionTransformer(SMALL)
    experts = with_experts(start, SMALL)
    train(experts, images, labels, 60, SMALL.share)
    model = folded(experts)
    compiled = moec.compile(model, (test_images[:4],))
    print(f"experts while training: {sum(p.numel() for p in experts.parameters()):,} parameters")
    print(
        f"deployed: {sum(p.numel() for p in model.parameters()):,}, MoE blocks: {compiled.blocks}"
    )
    with torch.inference_mode():
        error = (compiled(test_images) - model(test_images)).abs().max()
    print(f"greatest difference to eager: {error:.1e}")
    print(f"accuracy on digits after 60 steps: {accuracy(compiled, test_images, test_labels):.3f}")
    print("no gains of the paper here; those of examples/10_ewa.py: docs/benchmarks/ewa.md")


if __name__ == "__main__":
    main()
