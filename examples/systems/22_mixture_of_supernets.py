"""Mixture-of-Supernets (arXiv 2306.04845): sub-networks share weights, customised by a mixture.

A supernet holds two copies ("experts") of each feed-forward weight. A router reads the numbers of
an architecture, and the weight of a layer is a mixture of the first rows and columns of the copies,
with one share per copy (layer-wise), or one per copy and output neuron (neuron-wise). Training uses
all sub-networks, and the best one is searched for without further training. Once it is chosen, its
mixture is constant, and `fold-supernet` makes a dense network of its size.

The small run learns scikit-learn's handwritten digits.

    python examples/systems/22_mixture_of_supernets.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

COPIES = 2


@dataclass(frozen=True)
class Size:
    """The greatest sizes; `hidden` has the sizes that a sub-network may choose for each layer."""

    layers: int
    width: int
    heads: int
    hidden: tuple[int, ...]
    features: int
    tokens: int
    classes: int
    router: int = 64


SMALL = Size(layers=2, width=32, heads=4, hidden=(32, 64, 128), features=4, tokens=16, classes=10)
BERT_BASE = Size(12, 768, 12, (1024, 2048, 3072), features=768, tokens=128, classes=2, router=128)

Architecture = tuple[int, ...]
"""The hidden size of each layer."""


def numbers(size: Size, architecture: Architecture) -> Tensor:
    """The router's input for an architecture, [1, layers]: each size divided by the greatest."""
    return torch.tensor([[hidden / size.hidden[-1] for hidden in architecture]])


class LayerWise(nn.Module):
    """A linear layer whose weight is sum_i r_i * W_i, r = softmax(W2 relu(W1 a))."""

    def __init__(self, size: Size, inputs: int, outputs: int) -> None:
        super().__init__()
        self.router = nn.Sequential(
            nn.Linear(size.layers, size.router), nn.ReLU(), nn.Linear(size.router, COPIES)
        )
        self.copies = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(COPIES))

    def forward(self, x: Tensor, numbers: Tensor, inputs: int, outputs: int) -> Tensor:
        shares = self.router(numbers)[0].softmax(dim=-1)
        weight, bias = torch.zeros(()), torch.zeros(())
        for share, linear in zip(shares, self.copies, strict=True):
            weight = weight + share * linear.weight[:outputs, :inputs]
            bias = bias + share * linear.bias[:outputs]
        return F.linear(x, weight, bias)


class NeuronWise(nn.Module):
    """A linear layer whose weight is sum_i diag(b_i) * W_i, with a share for each output neuron."""

    def __init__(self, size: Size, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.router = nn.Sequential(
            nn.Linear(size.layers, size.router), nn.ReLU(), nn.Linear(size.router, COPIES * outputs)
        )
        self.copies = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(COPIES))

    def forward(self, x: Tensor, numbers: Tensor, inputs: int, outputs: int) -> Tensor:
        shares = self.router(numbers).view(COPIES, self.outputs).softmax(dim=0)[:, :outputs]
        weight, bias = torch.zeros(()), torch.zeros(())
        for share, linear in zip(shares, self.copies, strict=True):
            weight = weight + torch.diag(share) @ linear.weight[:outputs, :inputs]
            bias = bias + share * linear.bias[:outputs]
        return F.linear(x, weight, bias)


class Layer(nn.Module):
    def __init__(self, size: Size, mixture: type[LayerWise | NeuronWise]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.heads, self.width = size.heads, size.width
        self.qkv, self.out = (
            nn.Linear(size.width, 3 * size.width),
            nn.Linear(size.width, size.width),
        )
        self.up = mixture(size, size.width, size.hidden[-1])
        self.down = mixture(size, size.hidden[-1], size.width)

    def forward(self, x: Tensor, numbers: Tensor, hidden: int) -> Tensor:
        b, s, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, width // self.heads)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        rows = F.gelu(self.up(self.norm2(x), numbers, width, hidden))
        return x + self.down(rows, numbers, hidden, width)


class Supernet(nn.Module):
    """x [B, tokens, features], numbers [1, layers] -> scores [B, classes] of the sub-network
    `architecture`; `numbers` must be those of this architecture."""

    def __init__(self, size: Size, mixture: type[LayerWise | NeuronWise]) -> None:
        super().__init__()
        self.size, self.architecture = size, (size.hidden[-1],) * size.layers
        self.embed = nn.Linear(size.features, size.width)
        self.positions = nn.Parameter(torch.randn(size.tokens, size.width) * 0.1)
        self.layers = nn.ModuleList(Layer(size, mixture) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.classes)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        for layer, hidden in zip(self.layers, self.architecture, strict=True):
            x = layer(x, numbers, hidden)
        y: Tensor = self.head(self.norm(x.mean(dim=1)))
        return y


def digits() -> tuple[Tensor, Tensor]:
    """Images as sixteen patches of 2 x 2 pixels [N, 16, 4], and their classes [N]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    patches = images.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    return patches, torch.tensor(data.target)


def train(model: Supernet, steps: int) -> list[float]:
    """Trains a random sub-network in each step. Returns the losses."""
    images, classes = digits()
    choices = torch.tensor(model.size.hidden)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        batch = torch.randint(1200, (64,))
        architecture = tuple(choices[torch.randint(len(choices), (model.size.layers,))].tolist())
        model.architecture = architecture
        loss = F.cross_entropy(
            model(images[batch], numbers(model.size, architecture)), classes[batch]
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def accuracy(model: Supernet, architecture: Architecture) -> float:
    """The accuracy on images that are not used for training."""
    images, classes = digits()
    model.architecture = architecture
    with torch.no_grad():
        scores = model(images[1200:], numbers(model.size, architecture))
    return float((scores.argmax(dim=-1) == classes[1200:]).float().mean())


def search(model: Supernet, most: int) -> Architecture:
    """The most accurate sub-network whose hidden sizes sum to at most `most`."""
    from itertools import product

    fitting = [a for a in product(model.size.hidden, repeat=model.size.layers) if sum(a) <= most]
    return max(fitting, key=lambda architecture: accuracy(model, architecture))


def fold(model: Supernet, architecture: Architecture) -> moec.CompiledModel:
    """The dense network of one architecture, with images as its only input."""
    model.architecture = architecture
    description = numbers(model.size, architecture)
    values = ":".join(str(float(number)) for number in description[0])
    size = model.size
    return moec.compile(
        model,
        (torch.randn(3, size.tokens, size.features), description),
        dynamic_shapes=({0: torch.export.Dim("B")}, None),
        passes=f"+fold-supernet(numbers={values})",
    )


class Folded(nn.Module):
    """x [B, S, D] -> [B, S, D]: a layer of BERT base whose architecture is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(BERT_BASE, LayerWise)
        self.register_buffer("numbers", numbers(BERT_BASE, (2048,) * BERT_BASE.layers))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, self.numbers, 2048)
        return y


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The layer for the tokens of one text."""
    return Folded().eval(), (torch.randn(1, BERT_BASE.tokens, BERT_BASE.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    for mixture in (LayerWise, NeuronWise):
        model = Supernet(SMALL, mixture)
        losses = train(model, steps=150)
        architecture = search(model, most=128)
        folded = fold(model, architecture)
        before = sum(p.numel() for p in model.parameters())
        after = sum(array.size for array in folded.package.arrays.values())
        x = torch.randn(5, SMALL.tokens, SMALL.features)
        with torch.no_grad():
            error = float((folded(x) - model(x, numbers(SMALL, architecture))).abs().max())
        print(f"{mixture.__name__}: loss {losses[0]:.2f}, then {losses[-1]:.2f}")
        print(f"  best sub-network {architecture}, accuracy {accuracy(model, architecture):.1%}")
        print(f"  {before:,} parameters of the supernet, {after:,} of the folded network")
        for line in folded.report().notes:
            print(f"  {line}")
        print(f"  greatest difference to eager {error:.0e}")
    with torch.device("meta"):
        published = Supernet(BERT_BASE, LayerWise)
    count = sum(p.numel() for p in published.parameters()) / 1e6
    print(f"feed-forward layers and attention of BERT base as a supernet: {count:.0f} M parameters")


if __name__ == "__main__":
    main()
