"""System 9, SE-MoE: one model for several tasks with batches of different sizes, with Switch or
GShard layers, elastic training, and deployment by a compiler, arXiv 2205.10034.

As in UFO, tasks share a trunk. Each task has its own head and its part of the batch: 512, 256, 128
and 128 rows in the paper's measurement. One artifact serves any mixture of tasks: their rows share
the experts, and the batch of a task may be empty.

    Switch   top-1; in training, U(1 - 0.1, 1 + 0.1) is added to the logits
    GShard   top-2; in training, the second choice is drawn at random by its weight
    both     C = ceil(1.2 T) rows per expert in training, 2.4 T in evaluation; it is never reached,
             as the authors do not divide by the number of experts; moec's artifact has no capacity

`devices_of` is the elastic part: light tasks share a device, heavy ones are split over several. The
paper's ring memory belongs to a runtime with an accelerator and is not included.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

PUBLISHED_LOADS = (512, 256, 128, 128)


@dataclass(frozen=True)
class Sizes:
    """`outputs` has the number of classes of each task's head."""

    inputs: int = 64
    width: int = 32
    hidden: int = 64
    experts: int = 4
    layers: int = 2
    gate: str = "switch"
    outputs: tuple[int, ...] = (10, 2, 2, 3)


class Switch(nn.Module):
    """logits[T, N] -> ids[T, 1], weights[T, 1], and in training the loss N * sum f P."""

    choices = 1

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            logits = logits + 0.9 + 0.2 * torch.rand_like(logits)
        shares = logits.softmax(-1)
        weights, ids = shares.topk(1, dim=-1)
        chosen = F.one_hot(ids[:, 0], shares.shape[-1]).to(shares.dtype)
        return ids, weights, shares.shape[-1] * (chosen.mean(0) * shares.mean(0)).sum()


class GShard(nn.Module):
    """Like `Switch`, with two choices, renormalised; in training the second is drawn at random."""

    choices = 2

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = logits.softmax(-1)
        weights, ids = shares.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            stays = 2 * weights[:, 1] > torch.rand(weights.shape[0])
            weights = torch.stack([weights[:, 0], weights[:, 1] * stays], dim=-1)
        first = F.one_hot(ids[:, 0], shares.shape[-1]).to(shares.dtype)
        return ids, weights, (first.mean(0) * shares.mean(0)).mean() * shares.shape[-1] ** 2


GATES = {"switch": Switch, "gshard": GShard}


class Experts(nn.Module):
    """x[T, D] -> [T, D]; an expert takes at most ceil(1.2 T) rows in training, otherwise 2.4 T."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.gate = GATES[sizes.gate]()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.width, sizes.hidden),
                nn.GELU(),
                nn.Linear(sizes.hidden, sizes.width),
            )
            for _ in range(sizes.experts)
        )
        self.loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        ids, weights, loss = self.gate(self.router(x))
        if self.training:
            self.loss = loss
        capacity = math.ceil((1.2 if self.training else 2.4) * x.shape[0])
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = ids == number
            fits = chosen & (chosen.any(-1).cumsum(0) <= capacity)[:, None]
            y = y + (weights * fits).sum(-1, keepdim=True) * expert(x)
        return y


class UFO(nn.Module):
    """The batches of four tasks, each [T_i, inputs] -> the logits of each, [T_i, outputs_i]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.entry = nn.Linear(sizes.inputs, sizes.width)
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(sizes.layers))
        self.layers = nn.ModuleList(Experts(sizes) for _ in range(sizes.layers))
        self.heads = nn.ModuleList(nn.Linear(sizes.width, count) for count in sizes.outputs)

    def forward(
        self, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor
    ) -> tuple[Tensor, ...]:
        tasks = (first, second, third, fourth)
        x = self.entry(torch.cat(tasks))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        rows = x.split([len(task) for task in tasks])
        return tuple(head(part) for head, part in zip(self.heads, rows, strict=True))


def devices_of(loads: Sequence[int], devices: int) -> list[list[Fraction]]:
    """The share of each task that each device takes, [devices][tasks].

    Tasks are lined up, and each device takes an equal part of all rows in order. So light tasks
    share a device, a heavy one is split, and every device has equal work.
    """
    share = Fraction(sum(loads), devices)
    ends = [sum(loads[: i + 1]) for i in range(len(loads))]
    shares = []
    for device in range(devices):
        low, high = device * share, (device + 1) * share
        overlap = (
            max(Fraction(0), min(high, end) - max(low, end - load))
            for end, load in zip(ends, loads, strict=True)
        )
        shares.append([part / load for part, load in zip(overlap, loads, strict=True)])
    return shares


def throughput(loads: Sequence[int], shares: Sequence[Sequence[Fraction]]) -> float:
    """Rows per device and unit of time if a row takes one unit; all devices wait for the
    slowest."""
    slowest = max(
        sum(part * load for part, load in zip(device, loads, strict=True)) for device in shares
    )
    return float(sum(loads) / slowest / len(shares))


def labels_of(digits: Tensor) -> tuple[Tensor, ...]:
    """Four tasks over digits: the digit, whether it is even, whether it is above four, and its
    remainder modulo three."""
    return digits, digits % 2, (digits > 4).long(), digits % 3


def batches(loads: Sequence[int], seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A batch of scikit-learn's digits for each task, [load, 64], and its labels [load]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = labels_of(torch.tensor(data.target))
    chance = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(images), (load,), generator=chance) for load in loads]
    labels = tuple(label[row] for label, row in zip(labels, rows, strict=True))
    return tuple(images[row] for row in rows), labels


def train(model: UFO, loads: Sequence[int], steps: int) -> list[float]:
    """The loss of each step: that of all tasks, and the balance of the experts."""
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        images, labels = batches(loads, step)
        logits = model.train()(*images)
        loss = torch.stack(
            [F.cross_entropy(task, label) for task, label in zip(logits, labels, strict=True)]
        ).sum()
        balance = sum((layer.loss for layer in model.layers), torch.zeros(()))
        optimiser.zero_grad()
        (loss + 0.01 * balance).backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def compiled(model: UFO) -> moec.CompiledModel:
    """One artifact for any mixture of tasks; the batch of a task may be empty."""
    names = ("first", "second", "third", "fourth")
    shapes = {name: {0: torch.export.Dim(f"T{i}", min=0, max=4096)} for i, name in enumerate(names)}
    return moec.compile(model.eval(), batches((8, 4, 3, 2))[0], dynamic_shapes=shapes)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of a trunk with ViT-Base's width, and the rows of the four tasks' batches."""
    sizes = Sizes(width=768, hidden=3072, experts=8)
    return Experts(sizes).eval(), (torch.randn(sum(PUBLISHED_LOADS), sizes.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    for gate in GATES:
        model = UFO(Sizes(gate=gate))
        losses = train(model, (64, 32, 16, 16), 60)
        artifact = compiled(model)
        print(f"{gate}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")
        for block in artifact.blocks:
            print(f"  {block.name}: {block.experts} experts, {block.router}")
        for loads in (PUBLISHED_LOADS, (0, 0, 5, 0)):
            images, labels = batches(loads, seed=99)
            with torch.no_grad():
                expected = model(*images)
            outputs = artifact(*images)
            error = max(
                float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True) if len(a)
            )
            share = [
                float((a.argmax(-1) == label).float().mean()) if len(a) else float("nan")
                for a, label in zip(outputs, labels, strict=True)
            ]
            accuracy = ", ".join(f"{s:.0%}" for s in share if not math.isnan(s))
            print(f"  rows {loads}: differs from eager by {error:.0e}; right: {accuracy}")
    print("\ndevices: rows a device and unit of time, by counting rows; the paper measured")
    alone = [[Fraction(int(i == j)) for j in range(4)] for i in range(4)]
    split = devices_of(PUBLISHED_LOADS, 8)
    print(f"  a device a task: {throughput(PUBLISHED_LOADS, alone):.2f}; 62.6 samples/s a GPU")
    print(f"  8 devices, split: {throughput(PUBLISHED_LOADS, split):.2f}; 74.0 samples/s a GPU")


if __name__ == "__main__":
    main()
