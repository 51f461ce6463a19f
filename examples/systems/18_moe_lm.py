"""MoE-LM (arXiv 2206.00059): a dialogue manager selects among the utterances of several experts.

A language model encodes a conversation as a latent vector z. Each expert draws its own latent, z' ~
N(mu_i(z), sigma_i(z)^2), and one shared decoder turns it into an utterance. Expert 0 is the
primitive one, trained as a variational autoencoder. The others are tuned to increase the reward of
their utterances, by labels of their skill. The manager estimates the value of each candidate in its
conversation, and selects the best.

The abstract confirms these three parts; the formulas are our reading of the method. A model is
served with all candidates of all conversations in one batch: one encoding, one product for the
heads of all experts, one decoder.

    python examples/systems/18_moe_lm.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Size:
    words: int
    width: int
    heads: int
    layers: int
    latent: int
    experts: int
    length: int  # of an utterance


SMALL = Size(words=32, width=32, heads=2, layers=1, latent=16, experts=5, length=6)
START = 0


class Layer(nn.Module):
    """x [B, S, D] -> [B, S, D]; causal or not."""

    def __init__(self, size: Size, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = size.heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.out = (
            nn.Linear(size.width, 3 * size.width),
            nn.Linear(size.width, size.width),
        )
        self.up, self.down = (
            nn.Linear(size.width, 4 * size.width),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Tokens [B, S] -> latents [B, Z]: the mean of the last layer's outputs."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.words, size.width)
        self.positions = nn.Embedding(256, size.width)
        self.layers = nn.ModuleList(Layer(size, causal=False) for _ in range(size.layers))
        self.norm, self.out = nn.LayerNorm(size.width), nn.Linear(size.width, size.latent)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.out(self.norm(x).mean(dim=1))
        return y


class Expert(nn.Module):
    """z [B, Z], noise [B, Z] -> z' [B, Z] ~ N(mu(z), sigma(z)^2)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.mean, self.log_deviation = (nn.Linear(size.latent, size.latent) for _ in range(2))

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        y: Tensor = self.mean(z) + self.log_deviation(z).exp() * noise
        return y


class Candidates(nn.Module):
    """Contexts [B, S], noise [B, m, Z] -> z [B, Z], latents of the candidates [B, m, Z]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.encoder = Encoder(size)
        self.experts = nn.ModuleList(Expert(size) for _ in range(size.experts))

    def forward(self, contexts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(contexts)
        latents = [expert(z, noise[:, i]) for i, expert in enumerate(self.experts)]
        return z, torch.stack(latents, dim=1)


class Decoder(nn.Module):
    """Latents [B, Z], tokens [B, S] -> scores of the next token at each position [B, S, words]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.latent = (
            nn.Embedding(size.words, size.width),
            nn.Linear(size.latent, size.width),
        )
        self.positions = nn.Embedding(size.length + 1, size.width)
        self.layers = nn.ModuleList(Layer(size, causal=True) for _ in range(size.layers))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.words)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        x = x + self.latent(latents)[:, None]
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.norm(x))
        return y


class Manager(nn.Module):
    """z [B, Z], candidates [B, m, N] -> values [B, m], and the candidate of greatest value [B]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.encoder = Encoder(size)
        self.value = nn.Sequential(
            nn.Linear(2 * size.latent, size.width), nn.ReLU(), nn.Linear(size.width, 1)
        )

    def forward(self, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        b, m, n = candidates.shape
        utterances = self.encoder(candidates.reshape(b * m, n)).reshape(b, m, -1)
        both = torch.cat([z[:, None].expand(b, m, z.shape[-1]), utterances], dim=-1)
        values = self.value(both)[..., 0]
        return values, values.argmax(dim=-1)


Parts = tuple[
    Callable[..., tuple[Tensor, Tensor]],
    Callable[..., Tensor],
    Callable[..., tuple[Tensor, Tensor]],
]
"""The functions for latents, decoding and values: modules or compiled models."""


def converse(parts: Parts, size: Size, contexts: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [B, m, N], decoded greedily in one batch, and the selected ones [B]."""
    candidates, decoder, manager = parts
    z, latents = candidates(contexts, noise)
    rows = latents.flatten(0, 1)
    tokens = torch.full((len(rows), 1), START)
    for _ in range(size.length):
        scores = decoder(rows, tokens)
        tokens = torch.cat([tokens, scores[:, -1:].argmax(dim=-1)], dim=1)
    utterances = tokens[:, 1:].view(len(contexts), size.experts, size.length)
    return utterances, manager(z, utterances)[1]


LAYER_PASSES = "+join-linears"
"""The passes for the encoder: the heads of all experts become one product."""
SKILLS = 4
"""What the experts other than the primitive one are tuned for: to use the words of one topic."""


def topic(tokens: Tensor) -> Tensor:
    """The topic of each word of an utterance; the first words of the vocabulary have none."""
    return (tokens - 4) * SKILLS // 28


def utterances(size: Size, topics: Tensor) -> Tensor:
    """One utterance [B, N] for each topic [B]: random words of the topic."""
    words = 28 // SKILLS
    return 4 + topics[:, None] * words + torch.randint(words, (len(topics), size.length))


def reward(tokens: Tensor, skill: Tensor | int) -> Tensor:
    """The share of an utterance's words [.., N] that belong to the topic: [..]."""
    wished = torch.as_tensor(skill)
    return ((tokens >= 4) & (topic(tokens) == wished[..., None])).float().mean(dim=-1)


def latent_loss(parts: tuple[Candidates, Decoder], tokens: Tensor, expert: int) -> Tensor:
    """The negative evidence bound of utterances [B, N] under one expert: z is encoded from the
    utterance, a sample of the expert's Gaussian is decoded, and the distance to N(0, I) is
    added."""
    candidates, decoder = parts
    head = candidates.experts[expert]
    z = candidates.encoder(tokens)
    sample = head(z, torch.randn_like(z))
    start = torch.full((len(tokens), 1), START)
    scores = decoder(sample, torch.cat([start, tokens[:, :-1]], dim=1))
    mean, log_deviation = head.mean(z), head.log_deviation(z)
    distance = (mean**2 + (2 * log_deviation).exp() - 1).sum(-1) / 2 - log_deviation.sum(-1)
    return F.cross_entropy(scores.flatten(0, 1), tokens.flatten()) + 0.002 * distance.mean()


def tuning_loss(
    parts: tuple[Candidates, Decoder], contexts: Tensor, expert: int, size: Size
) -> Tensor:
    """The loss that makes an expert's latent of any conversation decode to words that its label
    rewards."""
    candidates, decoder = parts
    tokens = utterances(size, torch.randint(SKILLS, (len(contexts),)))
    z = candidates.encoder(contexts).detach()
    sample = candidates.experts[expert](z, torch.randn_like(z))
    start = torch.full((len(tokens), 1), START)
    scores = decoder(sample, torch.cat([start, tokens[:, :-1]], dim=1))
    weight = reward(tokens, expert - 1)
    losses = F.cross_entropy(scores.transpose(1, 2), tokens, reduction="none").mean(dim=-1)
    return (weight * losses).sum() / weight.sum().clamp(min=1)


def conversations(size: Size, count: int) -> tuple[Tensor, Tensor]:
    """Contexts [B, N + 1] that begin with the requested topic [B]."""
    wishes = torch.randint(SKILLS, (count,))
    words = utterances(size, torch.randint(SKILLS, (count,)))
    return torch.cat([wishes[:, None], words], dim=1), wishes


@dataclass(frozen=True)
class Learned:
    """The losses of the primitive expert, of the others, and of the manager's values."""

    primitive: list[float]
    tuned: list[float]
    manager: list[float]


def train(
    candidates: Candidates, decoder: Decoder, manager: Manager, size: Size, steps: int
) -> Learned:
    """Trains the three parts in turn: the primitive expert with encoder and decoder, the other
    experts alone, and the manager, whose values are regressed on the rewards of the utterances."""
    learned, parts = Learned([], [], []), (candidates, decoder)
    shared = [*candidates.encoder.parameters(), *candidates.experts[0].parameters()]
    first = torch.optim.Adam([*shared, *decoder.parameters()], lr=4e-3)
    for _ in range(2 * steps):
        tokens = utterances(size, torch.randint(SKILLS, (64,)))
        step(first, latent_loss(parts, tokens, 0), learned.primitive)
    heads = [p for expert in candidates.experts[1:] for p in expert.parameters()]
    second = torch.optim.Adam(heads, lr=1e-2)
    for _ in range(steps):
        contexts, _ = conversations(size, 32)
        losses = [tuning_loss(parts, contexts, e, size) for e in range(1, size.experts)]
        step(second, torch.stack(losses).mean(), learned.tuned)
    third = torch.optim.Adam(manager.parameters(), lr=4e-3)
    for _ in range(2 * steps):
        contexts, wishes = conversations(size, 64)
        with torch.no_grad():
            sentence, _ = converse((candidates, decoder, manager), size, contexts, noise(size, 64))
            z = candidates.encoder(contexts)
        values, _ = manager(z, sentence)
        step(third, F.mse_loss(values, reward(sentence, wishes[:, None])), learned.manager)
    return learned


def step(optimiser: torch.optim.Optimizer, loss: Tensor, losses: list[float]) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())


def noise(size: Size, count: int) -> Tensor:
    return torch.randn(count, size.experts, size.latent)


def build(size: Size, steps: int) -> tuple[Candidates, Decoder, Manager, Learned]:
    parts = Candidates(size), Decoder(size), Manager(size)
    return *parts, train(*parts, size, steps)


def chosen_reward(parts: Parts, size: Size, count: int = 256) -> tuple[float, float, float]:
    """The mean reward of the manager's selection, of a random candidate, and of the best one."""
    contexts, wishes = conversations(size, count)
    with torch.no_grad():
        sentence, pick = converse(parts, size, contexts, noise(size, count))
    rewards = reward(sentence, wishes[:, None])
    picked = rewards.gather(1, pick[:, None])
    return float(picked.mean()), float(rewards.mean()), float(rewards.max(dim=1).values.mean())


def compiled_parts(
    parts: tuple[Candidates, Decoder, Manager], size: Size
) -> list[moec.CompiledModel]:
    """Each part as an artifact for any number of conversations of any length."""
    batch, length = torch.export.Dim("B"), torch.export.Dim("S")
    contexts, _ = conversations(size, 3)
    rows = torch.randn(4, size.latent)
    axes = {0: batch, 1: length}
    calls: list[tuple[nn.Module, tuple[Tensor, ...], tuple[dict[int, object], ...], str]] = [
        (parts[0], (contexts, noise(size, 3)), (axes, {0: batch}), LAYER_PASSES),
        (parts[1], (rows, torch.randint(size.words, (4, 3))), ({0: batch}, axes), ""),
        (
            parts[2],
            (rows[:3], torch.randint(size.words, (3, size.experts, size.length))),
            ({0: batch}, {0: batch}),
            "",
        ),
    ]
    return [
        moec.compile(module, inputs, dynamic_shapes=shapes, passes=passes, kv_cache=False)
        for module, inputs, shapes, passes in calls
    ]


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The encoder and the heads of ten experts over 16 conversations of 32 tokens, with widths
    chosen here, for benchmarks/systems."""
    size = Size(words=8192, width=256, heads=4, layers=2, latent=128, experts=10, length=16)
    contexts = torch.randint(size.words, (16, 32))
    return Candidates(size).eval(), (contexts, torch.randn(16, size.experts, size.latent))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    *parts, learned = build(SMALL, steps=60)
    for name, losses in vars(learned).items():
        print(f"{name}: loss {losses[0]:.2f}, then {sum(losses[-5:]) / 5:.2f}")
    print(
        "reward picked by the manager {:.2f}, of any candidate {:.2f}, of the best {:.2f}".format(
            *chosen_reward(tuple(parts), SMALL)
        )
    )
    served = compiled_parts(tuple(parts), SMALL)
    for line in served[0].report().notes:
        print(line)
    contexts, _ = conversations(SMALL, 8)
    fixed = noise(SMALL, 8)
    with torch.no_grad():
        eager = converse(tuple(parts), SMALL, contexts, fixed)
        ours = converse(tuple(served), SMALL, contexts, fixed)
    same = [torch.equal(a, b) for a, b in zip(eager, ours, strict=True)]
    print(
        f"candidates of 8 conversations equal to eager's: {same[0]}; the manager's picks: {same[1]}"
    )


if __name__ == "__main__":
    main()
