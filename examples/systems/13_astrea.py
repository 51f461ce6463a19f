"""System 13, Astrea: a vision-language model whose image goes to four experts of different kinds
(detection, segmentation, classification, captioning), arXiv 2503.09445.

The paper's abstract names the parts and gives no formula. The form here is

    y = sum_e a_e P_e(E_e(x)),   a = softmax(MLP(mean of x))

with four different graphs and output shapes E_e, projectors P_e to the language model's tokens,
stochastic residual connections in training, and a contrastive loss against a momentum encoder.
Inference needs only the experts, projectors and weights. moec makes one node of the four experts
and their weights; the momentum encoder and the losses are not in its graph.

The example is trained on scikit-learn's digits: it predicts the digit, and matches its momentum
encoder.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

EXPERTS = ("detection", "segmentation", "classification", "captioning")


@dataclass(frozen=True)
class Sizes:
    side: int = 8
    width: int = 32
    hidden: int = 64
    tokens: int = 4
    classes: int = 10
    boxes: int = 3


class Detection(nn.Module):
    """Patches [B, N, D] -> boxes [B, Q, 5], by attention from Q learned queries to the patches."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(sizes.boxes, sizes.width) / sizes.width**0.5)
        self.key, self.value = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.box = nn.Linear(sizes.width, 5)

    def forward(self, x: Tensor) -> Tensor:
        shares = (self.queries @ self.key(x).transpose(1, 2)).softmax(-1)
        return self.box(shares @ self.value(x)).sigmoid()


class Segmentation(nn.Module):
    """[B, N, D] -> [B, N, 2]: a class for each patch, from it and its neighbours."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.near = nn.Conv1d(sizes.width, sizes.width, 3, padding=1)
        self.mask = nn.Linear(sizes.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        near = F.relu(self.near(x.transpose(1, 2))).transpose(1, 2)
        return self.mask(near).softmax(-1)


class Classification(nn.Module):
    """[B, N, D] -> [B, classes]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.hidden = nn.Linear(sizes.width, sizes.hidden)
        self.classes = nn.Linear(sizes.hidden, sizes.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(F.gelu(self.hidden(x.mean(1))))


class Captioning(nn.Module):
    """[B, N, D] -> [B, tokens, D]: a recurrent state that is output after each token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.first, self.next = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.tokens = sizes.tokens

    def forward(self, x: Tensor) -> Tensor:
        state, words = torch.tanh(self.first(x.amax(1))), []
        for _ in range(self.tokens):
            state = torch.tanh(self.next(state))
            words.append(state)
        return torch.stack(words, dim=1)


class Projector(nn.Module):
    """Maps an expert's result of any shape [B, ..] to tokens [B, tokens, D]."""

    def __init__(self, count: int, sizes: Sizes) -> None:
        super().__init__()
        self.linear = nn.Linear(count, sizes.tokens * sizes.width)
        self.tokens = sizes.tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).unflatten(1, (self.tokens, -1))


class Vision(nn.Module):
    """Patches [B, N, D] -> tokens for the language model [B, tokens, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.side
        kinds = (Detection, Segmentation, Classification, Captioning)
        inputs = (sizes.boxes * 5, n * 2, sizes.classes, sizes.tokens * sizes.width)
        self.experts = nn.ModuleDict(
            {name: kind(sizes) for name, kind in zip(EXPERTS, kinds, strict=True)}
        )
        self.projectors = nn.ModuleDict(
            {name: Projector(count, sizes) for name, count in zip(EXPERTS, inputs, strict=True)}
        )
        self.residual = nn.Linear(sizes.width, sizes.width)
        self.allocator = nn.Sequential(
            nn.Linear(sizes.width, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, len(EXPERTS))
        )
        self.active = 0.8  # probability of an expert's residual connection in training

    def forward(self, x: Tensor) -> Tensor:
        shares = self.allocator(x.mean(1)).softmax(-1)
        y = torch.zeros(x.shape[0], 1, 1)
        rest = self.residual(x.mean(1))[:, None]
        for number, name in enumerate(EXPERTS):
            tokens = self.projectors[name](self.experts[name](x))
            keep = torch.rand(()) < self.active if self.training else True
            y = y + shares[:, number, None, None] * (tokens + rest if keep else tokens)
        return y


class Astrea(nn.Module):
    """Images [B, side, side] -> logits of the language model [B, classes].

    The language model is one attention over the visual tokens and a head: enough to name a digit.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch = nn.Linear(sizes.side, sizes.width)
        self.place = nn.Parameter(torch.randn(sizes.side, sizes.width) / 10)
        self.vision = Vision(sizes)
        self.query = nn.Parameter(torch.randn(sizes.width) / sizes.width**0.5)
        self.head = nn.Linear(sizes.width, sizes.classes)

    def encode(self, image: Tensor) -> Tensor:
        return self.vision(self.patch(image) + self.place)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.encode(image)
        shares = (tokens @ self.query).softmax(-1)
        return self.head((shares[..., None] * tokens).sum(1))


class Trainer:
    """The model and a momentum encoder that follows it. The losses are the cross entropy of the
    digits, and a contrastive loss: an image must be closer to the momentum encoder's output for it
    than to those for other images. A compiled model contains none of this."""

    def __init__(self, model: Astrea, momentum: float = 0.99) -> None:
        self.model, self.momentum = model.train(), momentum
        self.slow = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)

    def step(self, image: Tensor, label: Tensor) -> float:
        fast = F.normalize(self.model.encode(image).flatten(1), dim=-1)
        with torch.no_grad():
            slow = F.normalize(self.slow.encode(image).flatten(1), dim=-1)
        contrast = F.cross_entropy(fast @ slow.T / 0.1, torch.arange(len(image)))
        loss = F.cross_entropy(self.model(image), label) + 0.1 * contrast
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for behind, ahead in zip(self.slow.parameters(), self.model.parameters(), strict=True):
                behind.lerp_(ahead, 1 - self.momentum)
        return float(loss.detach())


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's images [N, 8, 8] and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def train(model: Astrea, steps: int) -> list[float]:
    """The loss of each step; the model is left in eval mode."""
    images, labels = digits()
    trainer = Trainer(model)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        losses.append(trainer.step(images[rows], labels[rows]))
    model.eval()
    return losses


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The four experts over the 196 patches of four images, with a width chosen here, for
    benchmarks/systems."""
    sizes = Sizes(side=196, width=384, hidden=1536, tokens=16, boxes=32, classes=1000)
    return Vision(sizes).eval(), (torch.randn(4, sizes.side, sizes.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    model = Astrea(Sizes())
    losses = train(model, 120)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f} in {len(losses)} steps")
    images, labels = digits()
    artifact = moec.compile(model, (images[:3],))
    for block in artifact.blocks:
        print(f"{block.name}: {block.experts} experts {block.activation}, {block.router}")
    with torch.no_grad():
        right = model(images)
    result = artifact(images)
    print(f"greatest difference to eager: {float((result - right).abs().max()):.0e}")
    print(f"digits named: {float((result.argmax(-1) == labels).float().mean()):.0%} (chance: 10%)")
    print("the paper: 4.7 % more than others on average over 12 benchmarks, with trained experts")


if __name__ == "__main__":
    main()
