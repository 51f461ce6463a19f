"""System 10, the survey "Multi-Modal Generative AI" (arXiv 2409.14993), as its matrix of models.

The survey classifies models by how they model probability (autoregressive, diffusion) and by their
architecture (dense, MoE), for understanding and generating text, images and videos. Hybrids are an
autoregressive core with a diffusion decoder. Each of the six kinds is one small model here:

    autoregressive   a causal transformer: predicts the next token from those before it
    diffusion        a transformer that attends to all noisy tokens and predicts the noise
    hybrid           the causal transformer, and a decoder that denoises the next token given it

A model takes text, images and videos at once, each of any length including 0. So one artifact
serves a row of the matrix, and a single modality is a call in which the others are empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

PROBABILITIES = ("autoregressive", "diffusion", "hybrid")
ARCHITECTURES = ("dense", "moe")
MODALITIES = ("text", "image", "video", "multimodal")


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 32
    patch: int = 4
    tube: int = 8
    width: int = 16
    heads: int = 2
    hidden: int = 32
    experts: int = 4
    top_k: int = 2


@dataclass(frozen=True)
class Batch:
    """Token ids i64[B, S], patches of images [B, P, patch], tubes of videos [B, Q, tube]."""

    text: Tensor
    image: Tensor
    video: Tensor

    @staticmethod
    def random(modality: str, sizes: Sizes, length: int = 5, count: int = 2) -> Batch:
        """Inputs of one modality, or of all three."""
        lengths = {name: length if modality in (name, "multimodal") else 0 for name in MODALITIES}
        return Batch(
            torch.randint(sizes.vocabulary, (count, lengths["text"])),
            torch.randn(count, lengths["image"], sizes.patch),
            torch.randn(count, lengths["video"], sizes.tube),
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.text, self.image, self.video


class Entry(nn.Module):
    """Texts, images and videos as one sequence of vectors [B, S + P + Q, D]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.text = nn.Embedding(sizes.vocabulary, sizes.width)
        self.image = nn.Linear(sizes.patch, sizes.width)
        self.video = nn.Linear(sizes.tube, sizes.width)

    def forward(self, text: Tensor, image: Tensor, video: Tensor) -> Tensor:
        return torch.cat([self.text(text), self.image(image), self.video(video)], dim=1)


class Dense(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.hidden)
        self.down = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Sparse(nn.Module):
    """x[B, S, D] -> [B, S, D]: the top k experts, renormalised."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.experts = nn.ModuleList(Dense(sizes) for _ in range(sizes.experts))
        self.top_k = sizes.top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            share = (weights * (ids == number)).sum(-1, keepdim=True)
            y = y + share * expert(tokens)
        return y.reshape(x.shape)


class Block(nn.Module):
    def __init__(self, sizes: Sizes, architecture: str, causal: bool) -> None:
        super().__init__()
        d = sizes.width
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ffn = Dense(sizes) if architecture == "dense" else Sparse(sizes)
        self.heads, self.causal = sizes.heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norms[1](x))


class Autoregressive(nn.Module):
    """text, image, video -> predictions after each token: logits, a patch or a tube,
    concatenated."""

    def __init__(self, sizes: Sizes, architecture: str) -> None:
        super().__init__()
        self.entry, self.block = Entry(sizes), Block(sizes, architecture, causal=True)
        self.head = nn.Linear(sizes.width, sizes.vocabulary + sizes.patch + sizes.tube)

    def forward(self, text: Tensor, image: Tensor, video: Tensor) -> Tensor:
        return self.head(self.block(self.entry(text, image, video)))


class Diffusion(nn.Module):
    """text, image, video, noise for each ([B, S, D], [B, P, D], [B, Q, D]), t[B] -> the predicted
    noise, in the model's width."""

    def __init__(self, sizes: Sizes, architecture: str) -> None:
        super().__init__()
        self.entry, self.block = Entry(sizes), Block(sizes, architecture, causal=False)
        self.time = nn.Linear(1, sizes.width)
        self.head = nn.Linear(sizes.width, sizes.width)

    def forward(
        self, text: Tensor, image: Tensor, video: Tensor,
        of_text: Tensor, of_image: Tensor, of_video: Tensor, t: Tensor,
    ) -> Tensor:  # fmt: skip
        noise = torch.cat([of_text, of_image, of_video], dim=1)
        noisy = mixed(self.entry(text, image, video), noise, t)
        return self.head(self.block(noisy + self.time(t[:, None])[:, None]))


class Hybrid(nn.Module):
    """Like `Diffusion`, for the vector of each token given those before it: a decoder of few layers
    denoises the prediction of the causal core."""

    def __init__(self, sizes: Sizes, architecture: str) -> None:
        super().__init__()
        self.entry, self.block = Entry(sizes), Block(sizes, architecture, causal=True)
        self.time = nn.Linear(1, sizes.width)
        self.denoise = nn.Sequential(
            nn.Linear(2 * sizes.width, sizes.hidden),
            nn.SiLU(),
            nn.Linear(sizes.hidden, sizes.width),
        )

    def forward(
        self, text: Tensor, image: Tensor, video: Tensor,
        of_text: Tensor, of_image: Tensor, of_video: Tensor, t: Tensor,
    ) -> Tensor:  # fmt: skip
        noise = torch.cat([of_text, of_image, of_video], dim=1)
        x = self.entry(text, image, video)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        expected = self.block(before) + self.time(t[:, None])[:, None]
        return self.denoise(torch.cat([expected, mixed(x, noise, t)], dim=-1))


def mixed(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Linear interpolation: clean at t = 0, pure noise at t = 1."""
    share = t[:, None, None]
    return (1 - share).sqrt() * x + share.sqrt() * noise


MODELS = {"autoregressive": Autoregressive, "diffusion": Diffusion, "hybrid": Hybrid}


def build(probability: str, architecture: str, sizes: Sizes) -> nn.Module:
    return MODELS[probability](sizes, architecture)


def inputs_of(probability: str, batch: Batch, sizes: Sizes) -> tuple[Tensor, ...]:
    """The inputs of a model of this kind."""
    if probability == "autoregressive":
        return batch.inputs
    noise = (torch.randn(*part.shape[:2], sizes.width) for part in batch.inputs)
    return (*batch.inputs, *noise, torch.rand(len(batch.text)))


def compiled(model: nn.Module, probability: str, sizes: Sizes) -> moec.CompiledModel:
    """One artifact for every modality; any of them may be absent."""
    rows, s, p, q = (torch.export.Dim(name, min=low, max=256) for name, low in
                     (("B", 1), ("S", 0), ("P", 0), ("Q", 0)))  # fmt: skip
    shapes: tuple[dict[int, object], ...] = ({0: rows, 1: s}, {0: rows, 1: p}, {0: rows, 1: q})
    if probability != "autoregressive":
        shapes = (*shapes, *shapes, {0: rows})
    batch = Batch.random("multimodal", sizes)
    return moec.compile(model.eval(), inputs_of(probability, batch, sizes), dynamic_shapes=shapes)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The mixture of a cell with ViT-Base's width, over 256 tokens, for benchmarks/systems."""
    sizes = Sizes(width=768, hidden=3072, experts=8)
    return Sparse(sizes).eval(), (torch.randn(1, 256, sizes.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes()
    print(f"{'':16}{'':7}" + "".join(f"{modality:>12}" for modality in MODALITIES))
    for probability in PROBABILITIES:
        for architecture in ARCHITECTURES:
            model = build(probability, architecture, sizes)
            artifact = compiled(model, probability, sizes)
            line = f"{probability:16}{architecture:7}"
            for modality in MODALITIES:
                inputs = inputs_of(probability, Batch.random(modality, sizes), sizes)
                with torch.no_grad():
                    error = float((artifact(*inputs) - model(*inputs)).abs().max())
                line += f"{error:12.0e}"
            print(f"{line}  {len(artifact.blocks)} MoE block(s)")
    print("greatest difference to eager, by one artifact a line")


if __name__ == "__main__":
    main()
