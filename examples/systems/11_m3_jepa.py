"""System 11, M3-JEPA (first published as Alt-MoE): a mixture-of-experts connector between frozen
encoders of images and text, arXiv 2409.05929.

A vector of one modality is projected to the connector's width, and the connector predicts the
vector of the other modality. There are two objectives: a small distance (L2), and being the nearest
(contrastive). Each objective has an embedding that is added to the vector, and both share one MoE
layer. Every expert is evaluated, then the chosen ones are gathered, as in the authors' code.

moec evaluates only the K chosen experts of each vector, and merges the two calls that share weights
into one layer over twice the rows. The example is trained on scikit-learn's digits: the "text" is a
digit's name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

OBJECTIVES = ("l2", "contrastive")
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Sizes:
    """Widths of text and image vectors and of the connector, whose experts keep its width."""

    text: int = 64
    image: int = 64
    hidden: int = 128
    experts: int = 12
    top_k: int = 4


PUBLISHED = Sizes(text=4096, image=1024, hidden=2048)
"""DINOv2-large has 1024 features per image; 4096 is the width of a language model of 7B or 8B."""


class Experts(nn.Module):
    """h[B, H] -> [B, H]: all experts, then the K with the greatest softmax probability, not
    renormalised."""

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(experts)
        )
        self.dropout, self.norm, self.top_k = nn.Dropout(0.1), nn.LayerNorm(hidden), top_k

    def forward(self, h: Tensor) -> Tensor:
        weights, ids = self.gate(h).softmax(-1).topk(self.top_k, dim=-1)
        every = torch.stack([expert(h) for expert in self.experts], dim=1)
        chosen = every.gather(1, ids[..., None].expand(-1, -1, h.shape[-1]))
        y = (chosen * weights[..., None]).sum(1)
        return F.gelu(self.norm(self.dropout(y))) + h


class Connector(nn.Module):
    """text[B, text], image[B, image] -> for each direction two predictions, one per objective."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = {"text_to_image": (sizes.text, sizes.image)}
        widths["image_to_text"] = widths["text_to_image"][::-1]
        self.entry = nn.ModuleDict({d: nn.Linear(widths[d][0], sizes.hidden) for d in DIRECTIONS})
        self.objective = nn.Embedding(len(OBJECTIVES), sizes.hidden)
        self.moe = Experts(sizes.hidden, sizes.experts, sizes.top_k)
        self.head = nn.ModuleDict({d: nn.Linear(sizes.hidden, widths[d][1]) for d in DIRECTIONS})

    def predict(self, x: Tensor, direction: str) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.entry[direction](x))
        near = self.head[direction](self.moe(h + self.objective.weight[0]))
        nearest = self.head[direction](self.moe(h + self.objective.weight[1]))
        return near, nearest


class Query(nn.Module):
    """Predictions from stored vectors, text[B, text] -> [B, image] for L2 and for the contrastive
    objective. With an `encoder`, the inputs are those of the encoder: the model from end to end."""

    def __init__(self, connector: Connector, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.connector, self.encoder = connector, encoder

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder is not None:
            text = self.encoder(text)
        return self.connector.predict(text, "text_to_image")


class TextEncoder(nn.Module):
    """ids[B, S] -> [B, D]: frozen; the mean of its last hidden states."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(vocabulary, width), nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(ids))).mean(1)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def spelled(digits: Tensor) -> Tensor:
    """The names of digits as the ids of their letters, i64[B, 5], padded with 0."""
    rows = [[ord(letter) - 96 for letter in NAMES[int(d)].ljust(5, chr(96))] for d in digits]
    return torch.tensor(rows)


def loss_of(connector: Connector, text: Tensor, image: Tensor, step: int) -> Tensor:
    """The loss of both objectives; the direction alternates from step to step."""
    direction = DIRECTIONS[step % 2]
    x, target = (text, image) if direction == "text_to_image" else (image, text)
    near, nearest = connector.predict(x, direction)
    scores = F.normalize(nearest, dim=-1) @ F.normalize(target, dim=-1).T / 0.1
    return F.mse_loss(near, target) + F.cross_entropy(scores, torch.arange(len(x)))


def train(connector: Connector, text: Tensor, image: Tensor, steps: int) -> list[float]:
    """The loss of each step, over batches that contain each digit once."""
    optimiser = torch.optim.Adam(connector.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        rows = torch.randint(text.shape[0] // 10, (10,)) * 10 + torch.arange(10)
        loss = loss_of(connector, text[rows], image[rows], step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` images of each digit of scikit-learn, in the order 0 to 9: labels, images [N, 64]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels, images = torch.tensor(data.target), torch.tensor(data.data, dtype=torch.float32) / 16
    each = [images[labels == digit][:count] for digit in range(10)]
    return torch.arange(10).repeat(count), torch.stack(each, dim=1).flatten(0, 1)


def recall(scores: Tensor) -> float:
    """The share of queries [B, N] whose best image shows the named digit; images and queries are in
    the order 0 to 9."""
    return float((scores.argmax(-1) % 10 == torch.arange(len(scores)) % 10).float().mean())


def layer(queries: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The connector at the published sizes, and stored vectors of `queries` texts."""
    return Query(Connector(PUBLISHED)).eval(), (torch.randn(queries, PUBLISHED.text),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes()
    labels, images = digits(40)
    encoder = TextEncoder(27, sizes.text).requires_grad_(False).eval()
    text = encoder(spelled(labels))
    connector = Connector(sizes)
    losses = train(connector, text, images, 120)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-10:]) / 10:.2f} in {len(losses)} steps")
    stored = moec.compile(Query(connector.eval()), (text[:9],))
    full = moec.compile(Query(connector, encoder), (spelled(labels[:9]),))
    print(stored.report())
    near, nearest = stored(text[:10])
    with torch.no_grad():
        expected = Query(connector)(text[:10])
    errors = [float((a - b).abs().max()) for a, b in zip((near, nearest), expected, strict=True)]
    print(f"greatest difference to eager: {max(errors):.0e}")
    again = full(spelled(labels[:10]))
    print(f"stored vectors and end to end differ by {float((again[1] - nearest).abs().max()):.0e}")
    scores = F.normalize(nearest, dim=-1) @ F.normalize(images, dim=-1).T
    print(f"the best image shows the digit that was named: {recall(scores):.0%} (chance: 10%)")
    (block,) = stored.blocks
    share = block.active_parameters / block.parameters
    print(f"experts' work: {share:.0%} of evaluating all; calls of the connector: 2, blocks: 1")
    with torch.device("meta"):
        published = sum(p.numel() for p in Connector(PUBLISHED).parameters())
    print(f"published sizes: {published / 1e6:.0f} M parameters (the paper's figure was not found)")


if __name__ == "__main__":
    main()
