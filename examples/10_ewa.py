"""Experts Weights Averaging (arXiv 2308.06093) on real images, against dense training.

A small vision transformer learns scikit-learn's handwritten digits (8 x 8 pixels, patches of 4):
as it is, and with its FFNs as four experts each until they are folded back. Both train for the
same steps from the same start with the same batches, and both are then the same dense model.

Rate and decay are the best of nine pairs for the dense model, the share rate the best of five for
EWA, by the loss on 300 of the training images, in runs of other seeds. The two are a tie
(benchmarks/RESULTS.md).

    python examples/10_ewa.py           # a few steps of one seed, to see it run
    python examples/10_ewa.py --full    # twenty seeds, the means and their confidence intervals
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moec.train import EWA, Constant

PATCH, WIDTH, HIDDEN, DEPTH, HEADS = 4, 32, 128, 3, 4
BATCH, RATE, DECAY = 64, 6e-3, 0.05
EXPERTS, SHARE = 4, 0.01
SEEDS, STEPS = 20, 400


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images f32[B, 1, 8, 8] -> logits f32[B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(torch.randn((8 // PATCH) ** 2, WIDTH) / 50)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Data:
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def digits() -> Data:
    """1,797 images, the even ones to train on, the odd ones to test on."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    return Data((images[::2], labels[::2]), (images[1::2], labels[1::2]))


def train(model: nn.Module, data: Data, steps: int, seed: int, after: Callable[[], None]) -> None:
    """AdamW with a cosine; `after` runs after each of its steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    batches = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    images, labels = data.train
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=batches)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data.test[0]).argmax(-1) == data.test[1]).float().mean()) * 100


def cost(model: nn.Module) -> tuple[int, int]:
    """Parameters, and FLOPs for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def both(seed: int, steps: int, data: Data) -> tuple[nn.Module, nn.Module]:
    """A model trained as it is, and one from the same start trained as experts and folded."""
    torch.manual_seed(seed)
    dense = VisionTransformer()
    model: nn.Module = copy.deepcopy(dense)
    train(dense, data, steps, seed, lambda: None)
    ewa = EWA(model, experts=EXPERTS, share=Constant(SHARE))
    train(model, data, steps, seed, ewa.step)
    return dense, ewa.fold()


def interval(values: list[float]) -> str:
    """The mean, and how far the 95 % confidence interval of Student's t goes from it."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.2f}"


parser = argparse.ArgumentParser()
parser.add_argument("--full", action="store_true", help=f"{SEEDS} seeds, {STEPS} steps each")
full = parser.parse_args().full

data = digits()
rows: list[tuple[float, float]] = []
print(f"accuracy on {len(data.test[1])} images, in percent\nseed  dense    EWA")
for seed in range(SEEDS if full else 1):
    dense, folded = both(seed, STEPS if full else 20, data)
    rows.append((accuracy(dense, data), accuracy(folded, data)))
    print(f"{seed:4} {rows[-1][0]:6.2f} {rows[-1][1]:6.2f}", flush=True)

print(f"dense {interval([d for d, _ in rows])}")
print(f"EWA   {interval([e for _, e in rows])}")
print(f"EWA over dense, seed by seed: {interval([e - d for d, e in rows])}")
assert cost(folded) == cost(dense)
parameters, flops = cost(folded)
print(f"both: {parameters:,} parameters, {flops:,} FLOPs an image")
