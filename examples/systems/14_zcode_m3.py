"""System 14, Z-code M3: a multitask multilingual encoder-decoder with Switch layers, with pruned
experts, and with the experts of two models combined, arXiv 2109.10465.

Every second layer has experts. A token goes to the expert with the greatest softmax probability,
and the result is scaled by the probability. An expert takes C = max(ceil(T / N * factor), least)
tokens. If more tokens choose it, random token selection determines which it keeps: each token's
one-hot row is multiplied by a uniform number, and each expert keeps its C greatest. So late
positions are not at a disadvantage. The numbers are an input here, not a state of the module.

The first token is the language, as usual in multilingual translation. Two tasks share the model:
translation, and restoring a sentence with masked tokens. The example is trained on artificial
languages, each a permutation of the vocabulary: weights and data are random, the loss is real.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.passes.approximate.aggregate_experts import AggregateExperts


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 64
    languages: int = 4
    width: int = 32
    hidden: int = 64
    heads: int = 4
    encoder: int = 2
    decoder: int = 2
    experts: int = 4
    factor: float | None = None
    least: int = 4
    longest: int = 32


PUBLISHED = Sizes(
    vocabulary=250_000, languages=50, width=1024, hidden=4096, heads=16, encoder=24, decoder=12,
    experts=64, longest=512,
)  # fmt: skip
"""10 billion parameters and 50 languages are in the abstract. The widths are those of Transformer
Big with a deep encoder, chosen so that 64 experts in every second layer give 10 billion."""


def random_token_selection(mask: Tensor, priority: Tensor, capacity: int) -> Tensor:
    """Of the tokens that chose an expert (`mask` [T, N], one-hot), the `capacity` with the greatest
    `priority` [T, N], uniform in (0, 1)."""
    first = (mask * priority).topk(capacity, dim=0).indices
    return mask * torch.zeros_like(mask).scatter(0, first, 1)


class Switch(nn.Module):
    """x[T, D], priority[T, N] -> [T, D]; tokens beyond an expert's capacity give zeros."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.width, sizes.hidden),
                nn.ReLU(),
                nn.Linear(sizes.hidden, sizes.width),
            )
            for _ in range(sizes.experts)
        )
        self.sizes = sizes
        self.loss = torch.zeros(())

    def capacity(self, tokens: int) -> int:
        """The capacity of an expert; without a factor, it is the number of tokens."""
        if self.sizes.factor is None:
            return tokens
        share = math.ceil(tokens / self.sizes.experts * self.sizes.factor)
        return min(tokens, max(share, self.sizes.least))

    def forward(self, x: Tensor, priority: Tensor) -> Tensor:
        shares = self.gate(x.float()).softmax(-1)
        weight, chosen = shares.max(-1)
        mask = F.one_hot(chosen, shares.shape[-1])
        if self.training:
            self.loss = shares.shape[-1] * (shares.mean(0) * mask.float().mean(0)).sum()
        mask = random_token_selection(mask, priority, self.capacity(x.shape[0]))
        weight = weight * mask.sum(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + torch.where(chosen == number, weight, 0.0)[:, None] * expert(x)
        return y


class Dense(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(sizes.width, sizes.hidden),
            nn.Linear(sizes.hidden, sizes.width),
        )

    def forward(self, x: Tensor, priority: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(memory), self.value(memory))
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x[B, S, D], memory of the encoder? -> [B, S, D]."""

    def __init__(self, sizes: Sizes, ffn: nn.Module, decodes: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(sizes.width) for _ in range(3))
        self.attention = Attention(sizes.width, sizes.heads)
        self.cross = Attention(sizes.width, sizes.heads) if decodes else None
        self.ffn = ffn

    def forward(self, x: Tensor, priority: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, causal=self.cross is not None)
        if self.cross is not None and memory is not None:
            x = x + self.cross(self.norms[1](x), memory)
        tokens = self.norms[2](x).flatten(0, 1)
        return x + self.ffn(tokens, priority.flatten(0, 1)).reshape(x.shape)


class ZCodeM3(nn.Module):
    """source[B, S], target[B, U], priorities [B, S, N] and [B, U, N] -> logits [B, U, V]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        count = sizes.vocabulary + sizes.languages
        self.embed = nn.Embedding(count, sizes.width)
        self.place = nn.Embedding(sizes.longest, sizes.width)
        self.encoder, self.decoder = (
            nn.ModuleList(
                Layer(sizes, Switch(sizes) if i % 2 else Dense(sizes), decodes)
                for i in range(depth)
            )
            for depth, decodes in ((sizes.encoder, False), (sizes.decoder, True))
        )
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, count, bias=False)

    def read(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.place.weight[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor, first: Tensor, second: Tensor) -> Tensor:
        memory = self.read(source)
        for layer in self.encoder:
            memory = layer(memory, first)
        x = self.read(target)
        for layer in self.decoder:
            x = layer(x, second, memory)
        return self.head(self.norm(x))


def languages(sizes: Sizes) -> Tensor:
    """Each language's word for each meaning, [languages, vocabulary]: permutations."""
    chance = torch.Generator().manual_seed(7)
    each = [torch.randperm(sizes.vocabulary, generator=chance) for _ in range(sizes.languages)]
    return torch.stack(each)


def sentences(sizes: Sizes, count: int, length: int, masked: float = 0.0) -> tuple[Tensor, ...]:
    """Source and target ids [count, length + 1], each starting with its language. They are a
    translation or, with a share `masked` of words replaced by the word 0, a sentence to restore in
    its own language."""
    words = languages(sizes)
    meaning = torch.randint(sizes.vocabulary, (count, length))
    origin = torch.randint(sizes.languages, (count, 1))
    language = origin if masked else torch.randint(sizes.languages, (count, 1))
    source, target = words[origin, meaning], words[language, meaning]
    source = source.masked_fill(torch.rand(source.shape) < masked, 0)
    tags = sizes.vocabulary + language
    return torch.cat([tags, source], 1), torch.cat([tags, target], 1)


def priorities(sizes: Sizes, *tokens: int) -> Tensor:
    """Random numbers for random token selection, uniform in (0, 1): [.., N]."""
    return torch.rand(*tokens, sizes.experts)


def example(sizes: Sizes, count: int = 3, length: int = 5) -> tuple[Tensor, ...]:
    """The model's inputs: sentences, and priorities for the layers of encoder and decoder."""
    source, target = sentences(sizes, count, length)
    target = target[:, :-1]
    return source, target, priorities(sizes, *source.shape), priorities(sizes, *target.shape)


def train(model: ZCodeM3, steps: int) -> list[float]:
    """The loss of each step; translation and restoring alternate."""
    sizes: Sizes = model.encoder[1].ffn.sizes  # type: ignore[assignment, union-attr]
    optimiser = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        source, target = sentences(sizes, 32, 6, masked=0.15 * (step % 2))
        first, second = (priorities(sizes, *ids.shape) for ids in (source, target[:, :-1]))
        logits = model(source, target[:, :-1], first, second)
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        balance = sum(m.loss for m in model.modules() if isinstance(m, Switch))
        optimiser.zero_grad()
        (loss + 0.01 * balance).backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def compiled(
    model: ZCodeM3, sizes: Sizes, passes: object = "", **options: object
) -> moec.CompiledModel:
    """The artifact for any number and any lengths of sentences."""
    b, s, u = (torch.export.Dim(n, min=1, max=high) for n, high in
               (("B", 64), ("S", sizes.longest), ("U", sizes.longest)))  # fmt: skip
    shapes = ({0: b, 1: s}, {0: b, 1: u}, {0: b, 1: s}, {0: b, 1: u})
    return moec.compile(
        model.eval(),
        example(sizes),
        dynamic_shapes=shapes,
        passes=passes,
        kv_cache=False,
        **options,
    )  # type: ignore[arg-type]


def parameters(sizes: Sizes) -> int:
    """The number of parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in ZCodeM3(sizes).parameters())


def layer(tokens: int = 256) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A Switch layer at the published width with 16 of the 64 experts: all of them need 2 GB."""
    sizes = replace(PUBLISHED, experts=16)
    return Switch(sizes).eval(), (torch.randn(tokens, sizes.width), priorities(sizes, tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes()
    model = ZCodeM3(sizes)
    losses = train(model, 100)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-6:]) / 6:.2f} in {len(losses)} steps")
    artifact = compiled(model, sizes)
    inputs = example(sizes, 4, 7)
    with torch.no_grad():
        expected = model(*inputs)
    print(f"greatest difference to eager: {float((artifact(*inputs) - expected).abs().max()):.0e}")
    for block in artifact.blocks:
        print(f"  {block.name}: {block.experts} experts, {block.router}")
    names = ("source", "target", "first", "second")
    calib = dict(zip(names, example(sizes, 16, 7), strict=True))
    pruned = compiled(model, sizes, "+prune-experts(keep=0.5)", calib=calib)
    both = compiled(model, sizes, [AggregateExperts(other=ZCodeM3(sizes).eval())])
    for what, changed in (("pruned to half", pruned), ("two models side by side", both)):
        counts = ", ".join(str(block.experts) for block in changed.blocks)
        print(f"{what}: {counts} experts a layer")
    print(f"published sizes: {parameters(PUBLISHED) / 1e9:.1f} B parameters; the paper: 10 B")


if __name__ == "__main__":
    main()
