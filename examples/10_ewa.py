"""Experts Weights Averaging (arXiv 2308.06093) on real images, against dense training.

A small vision transformer learns scikit-learn's handwritten digits (8 x 8 pixels, patches of 4):
once as it is, and once with each FFN as four experts until they are folded back. Both train for the
same number of steps, from the same start, with the same batches, and result in the same dense
architecture.

Learning rate and weight decay are the best of nine pairs for the dense model, and the share rate is
the best of five for EWA, by the loss on 300 of the training images, in runs with other seeds. The
results are a tie.

With 100 images, all in each batch, the random partition is the only noise in the gradients. There
EWA is better than dense training, and worse than dense training with dropout. Both tables are in
docs/benchmarks/ewa.md, the search for the parameters in benchmarks/results/ewa_search.txt.

    python examples/10_ewa.py           # a few steps of one seed, to see it run
    python examples/10_ewa.py --full    # twenty seeds, the means and their confidence intervals
    python examples/10_ewa.py --few     # a hundred seeds with 100 images to train on
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
from training.ewa import EWA, ConstantRate, LinearRate

PATCH, WIDTH, HIDDEN, DEPTH, HEADS = 4, 32, 128, 3, 4
EXPERTS, RATE = 4, 6e-3


@dataclass(frozen=True)
class Setting:
    """How models are trained. `batch` is the number of images per batch; None means all images."""

    seeds: int
    steps: int
    decay: float
    share: Callable[[int], float]
    images: int
    batch: int | None
    dropouts: tuple[float, ...]  # of the dense models


FULL = Setting(20, 400, 0.05, ConstantRate(0.01), 899, 64, (0.0,))
FEW = Setting(100, 200, 0.5, LinearRate(0, 0.1, 200), 100, None, (0.0, 0.3))


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(dropout), nn.Linear(HIDDEN, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images f32[B, 1, 8, 8] -> logits f32[B, 10]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(torch.randn((8 // PATCH) ** 2, WIDTH) / 50)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Data:
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def digits(count: int, seed: int) -> Data:
    """1,797 images: `count` of the 899 with even indices for training, the others for testing."""
    result = load_digits()
    images = torch.tensor(result.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(result.target)
    even = torch.randperm(899, generator=torch.Generator().manual_seed(seed))[:count].sort()[0] * 2
    return Data((images[even], labels[even]), (images[1::2], labels[1::2]))


def train(
    model: nn.Module, data: Data, setting: Setting, steps: int, seed: int, after: Callable[[], None]
) -> None:
    """AdamW with a cosine schedule; `after` runs after each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, weight_decay=setting.decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    batches = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    images, labels = data.train
    for _ in range(steps):
        batch = torch.arange(len(images))
        if setting.batch:
            batch = torch.randint(len(images), (setting.batch,), generator=batches)
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
    """The number of parameters, and the FLOPs per image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def contenders(seed: int, steps: int, data: Data, setting: Setting) -> dict[str, nn.Module]:
    """Models trained densely, and one from the same start that is trained as experts and folded."""
    models: dict[str, nn.Module] = {}
    for dropout in setting.dropouts:
        torch.manual_seed(seed)
        model = VisionTransformer(dropout)
        if not dropout:
            start = copy.deepcopy(model)
        train(model, data, setting, steps, seed, lambda: None)
        models[f"dropout {dropout:g}" if dropout else "dense"] = model
    ewa = EWA(start, experts=EXPERTS, share=setting.share)
    train(start, data, setting, steps, seed, ewa.step)
    return models | {"EWA": ewa.fold()}


def interval(values: list[float]) -> str:
    """The mean, and half the width of its 95 % confidence interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.2f}"


torch.set_num_threads(1)  # the models are too small for two threads
parser = argparse.ArgumentParser()
parser.add_argument(
    "--full", action="store_true", help=f"{FULL.seeds} seeds, {FULL.steps} steps each"
)
parser.add_argument("--few", action="store_true", help=f"{FEW.images} images, {FEW.seeds} seeds")
arguments = parser.parse_args()
setting = FEW if arguments.few else FULL
full = arguments.full or arguments.few

rows: dict[str, list[float]] = {}
for seed in range(setting.seeds if full else 1):
    data = digits(setting.images, seed)
    models = contenders(seed, setting.steps if full else 20, data, setting)
    if not seed:
        print(f"accuracy on {len(data.test[1])} images, in percent")
        print("seed" + "".join(f"{name:>13}" for name in models))
    for name, model in models.items():
        rows.setdefault(name, []).append(accuracy(model, data))
    print(f"{seed:4}" + "".join(f"{row[-1]:13.2f}" for row in rows.values()), flush=True)

for name, row in rows.items():
    print(f"{name:12} {interval(row)}")
ewa = rows.pop("EWA")
for name, row in rows.items():
    difference = interval([e - d for d, e in zip(row, ewa, strict=True)])
    print(f"EWA over {name}, seed by seed: {difference}")
assert cost(models["EWA"]) == cost(models["dense"])
parameters, flops = cost(models["EWA"])
print(f"both: {parameters:,} parameters, {flops:,} FLOPs an image")
