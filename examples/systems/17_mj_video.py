"""MJ-VIDEO (arXiv 2502.01719): a reward model for generated videos, with a mixture on two levels.

A vision-language model reads a video and the prompt that it was made from. A linear layer computes
28 rewards, one per criterion, from the hidden state of the last token. A gate reads the hidden
state at the end of the prompt: it weights five aspects, and the criteria within each aspect. The
score is the sum of all rewards times both weights. The prompt ends where the five tokens that begin
the answer are; Python code finds them, and the position is an input.

The paper names the aspects. We did not find how its 28 criteria are assigned to them: the sizes
here are ours, and no result depends on them.

    python examples/systems/17_mj_video.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec

ASPECTS = {
    "alignment": range(0, 6),
    "safety": range(6, 12),
    "fineness": range(12, 17),
    "coherence": range(17, 23),
    "fairness": range(23, 28),
}
CRITERIA = 28
ANSWER = (3, 5, 7, 5, 3)  # the tokens that begin the answer, in the small vocabulary
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Size:
    """A vision transformer, a projector, and a language model."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_hidden: int
    patch: int
    side: int
    layers: int
    width: int
    heads: int
    key_heads: int
    hidden: int
    words: int
    gate: int = 1024


SMALL = Size(
    1, 32, 2, 64, 4, 8, layers=1, width=32, heads=4, key_heads=2, hidden=64, words=64, gate=32
)
INTERNVL2_2B = Size(24, 1024, 16, 4096, 14, 448, 24, 2048, 16, 8, 8192, words=92_553)


class Attention(nn.Module):
    """x [B, S, D] -> [B, S, D], by `key_heads` heads of keys; causal or not."""

    def __init__(self, width: int, heads: int, key_heads: int, causal: bool) -> None:
        super().__init__()
        self.head, self.causal = width // heads, causal
        self.query = nn.Linear(width, width, bias=not causal)
        self.key, self.value = (
            nn.Linear(width, key_heads * self.head, bias=not causal) for _ in range(2)
        )
        self.out = nn.Linear(width, width, bias=not causal)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = (
            linear(x).view(b, s, -1, self.head).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if self.causal:
            turns = 1_000_000 ** -(torch.arange(0, self.head, 2) / self.head)
            angles = torch.arange(s)[:, None] * torch.cat([turns, turns])
            q, k = (rotate(each, angles.cos(), angles.sin()) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, width))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class VisionLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.vision_width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, size.vision_heads, size.vision_heads, causal=False)
        self.up = nn.Linear(width, size.vision_hidden)
        self.down = nn.Linear(size.vision_hidden, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class Vision(nn.Module):
    """frames [B, F, 3, side, side] -> tokens of the language model [B, F * S / 4, D]: four
    neighbouring patches become one token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.vision_width
        self.patches = nn.Conv2d(3, width, size.patch, stride=size.patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.rows = size.side // size.patch
        self.positions = nn.Parameter(torch.randn(1, self.rows**2 + 1, width) * 0.02)
        self.layers = nn.ModuleList(VisionLayer(size) for _ in range(size.vision_layers))
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, size.width),
            nn.GELU(),
            nn.Linear(size.width, size.width),
        )

    def forward(self, frames: Tensor) -> Tensor:
        b, count = frames.shape[:2]
        x = self.patches(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(b * count, 1, -1), x], dim=1) + self.positions
        for layer in self.layers:
            x = layer(x)
        half = self.rows // 2
        x = x[:, 1:].reshape(b * count, half, 2, half, 2, -1).permute(0, 1, 3, 2, 4, 5)
        y: Tensor = self.projector(x.reshape(b, count * half * half, -1))
        return y


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.attention = Attention(size.width, size.heads, size.key_heads, causal=True)
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def gate(size: Size, outputs: int) -> nn.Sequential:
    """Three hidden layers with ReLU."""
    layers: list[nn.Module] = []
    for inputs in (size.width, size.gate, size.gate):
        layers += [nn.Linear(inputs, size.gate), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(size.gate, outputs))


class Mixture(nn.Module):
    """last [B, D], prompt [B, D] -> scores [B], weights of the aspects [B, 5], rewards [B, 28].

    Dense, for each sample: score = sum_a w_a * sum over the criteria c of a of v_c * r_c.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.rewards = nn.Linear(size.width, CRITERIA, bias=False)
        self.aspect_gate, self.criterion_gate = gate(size, len(ASPECTS)), gate(size, CRITERIA)
        self.aspect_scale, self.criterion_scale = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, last: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards = self.rewards(last)
        weights = self.aspect_scale * (self.aspect_gate(prompt) / TEMPERATURE).softmax(dim=-1)
        criteria = self.criterion_gate(prompt) / TEMPERATURE
        score = torch.zeros_like(rewards[:, 0])
        for aspect, members in enumerate(ASPECTS.values()):
            part = slice(members.start, members.stop)
            shares = self.criterion_scale * criteria[:, part].softmax(dim=-1)
            score = score + weights[:, aspect] * (shares * rewards[:, part]).sum(dim=-1)
        return score, weights, rewards


class RewardModel(nn.Module):
    """frames [B, F, 3, side, side], tokens [B, S], last [B], prompt [B] -> as `Mixture`.

    `last` and `prompt` are positions in `tokens`, as returned by `positions`.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.vision = Vision(size)
        self.embed = nn.Embedding(size.words, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm, self.mixture = nn.RMSNorm(size.width), Mixture(size)

    def forward(
        self, frames: Tensor, tokens: Tensor, last: Tensor, prompt: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = self.vision(frames)
        x = torch.cat([images, self.embed(tokens)], dim=1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)[:, images.shape[1] :]
        rows = torch.arange(x.shape[0])
        y: tuple[Tensor, Tensor, Tensor] = self.mixture(x[rows, last], x[rows, prompt])
        return y


def positions(tokens: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
    """tokens [B, S] -> the last position [B] that is not padding, and the start of the last
    `ANSWER` [B].

    Raises ValueError for a text without `ANSWER`.
    """
    last, prompt = [], []
    for text in tokens.tolist():
        last.append(max(i for i, token in enumerate(text) if token != padding))
        starts = [i for i in range(len(text)) if tuple(text[i : i + len(ANSWER)]) == ANSWER]
        if not starts:
            raise ValueError("a text does not hold the tokens that begin the answer")
        prompt.append(starts[-1])
    return torch.tensor(last), torch.tensor(prompt)


Scores = Callable[..., tuple[Tensor, Tensor, Tensor]]


def rank(model: Scores, pair: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The scores [B] of two videos for each prompt, all in one batch."""
    last, prompt = positions(tokens)
    both = [torch.cat([each, each]) for each in (tokens, last, prompt)]
    first, second = model(torch.cat(pair), *both)[0].chunk(2)
    return first, second


def videos(size: Size, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bright and dark videos [B, 2, 3, side, side], and texts [B, 12] with a prompt."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 2, 3, size.side, size.side)
    bright, dark = (torch.randn(shape, generator=generator) + level for level in (0.5, -0.5))
    tokens = torch.randint(10, size.words, (count, 12), generator=generator)
    tokens[:, 3 : 3 + len(ANSWER)] = torch.tensor(ANSWER)
    return bright, dark, tokens


def losses(
    model: RewardModel, better: Tensor, worse: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The Bradley-Terry loss of the scores; the squared error of all rewards (1 for the better
    video, 0 for the other one); and the squared weights of irrelevant aspects (the last two)."""
    last, prompt = positions(tokens)
    inputs = (torch.cat([each, each]) for each in (tokens, last, prompt))
    scores, weights, rewards = model(torch.cat([better, worse]), *inputs)
    first, second = scores.chunk(2)
    labels = torch.cat([torch.ones(len(better), 1), torch.zeros(len(worse), 1)])
    error = F.mse_loss(rewards, labels.expand_as(rewards))
    return -F.logsigmoid(first - second).mean(), error, weights[:, 3:].square().mean()


def train(model: RewardModel, size: Size, steps: int) -> list[list[float]]:
    """Three stages: the criteria, then also the aspects, then everything; the losses of each stage.
    The brighter video is the better one."""
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3)
    curves = []
    for stage, shares in enumerate(((0.0, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.1, 0.1))):
        curve = []
        for step in range(steps):
            inputs = videos(size, 16, seed=stage * steps + step)
            terms = losses(model, *inputs)
            loss = sum(share * term for share, term in zip(shares, terms, strict=True))
            adam.zero_grad()
            loss.backward()
            adam.step()
            curve.append(loss.item())
        curves.append(curve)
    return curves


def accuracy(model: Scores, size: Size) -> float:
    """The share of pairs in which the better video has the greater score."""
    bright, dark, tokens = videos(size, 64, seed=1_000_000)
    with torch.no_grad():
        first, second = rank(model, (bright, dark), tokens)
    return float((first > second).float().mean())


def serve(model: RewardModel, size: Size) -> moec.CompiledModel:
    """The artifact for any number of videos of one length."""
    bright, _, tokens = videos(size, 3, seed=0)
    batch = torch.export.Dim("B")
    inputs = (bright, tokens, *positions(tokens))
    return moec.compile(model, inputs, dynamic_shapes=({0: batch},) * 4, kv_cache=False)


def parameters(size: Size) -> int:
    """The number of parameters; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in RewardModel(size).parameters())


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The two levels of the published model over 16 answers, for benchmarks/systems."""
    width = INTERNVL2_2B.width
    return Mixture(INTERNVL2_2B).eval(), (torch.randn(16, width), torch.randn(16, width))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", action="store_true", help="count the published size")
    if parser.parse_args(arguments).published:
        count = parameters(INTERNVL2_2B) / 1e9
        print(f"InternVL2-2B's shape and the gates: {count:.2f} B parameters (2 B)")
        return
    torch.manual_seed(0)
    model = RewardModel(SMALL)
    before = accuracy(model, SMALL)
    for stage, curve in enumerate(train(model, SMALL, steps=60), start=1):
        print(f"stage {stage}: loss {curve[0]:.2f}, then {sum(curve[-5:]) / 5:.2f}")
    compiled = serve(model.eval(), SMALL)
    for block in compiled.blocks:
        print(f"{block.name}: {block.experts} experts, {block.router}, written as {block.form}")
    print(f"pairs ranked right: {before:.0%}, then {accuracy(model, SMALL):.0%}", end="; ")
    print(f"by the artifact {accuracy(compiled, SMALL):.0%}")
    bright, dark, tokens = videos(SMALL, 8, seed=7)
    with torch.no_grad():
        eager = torch.cat(rank(model, (bright, dark), tokens))
    error = float((torch.cat(rank(compiled, (bright, dark), tokens)) - eager).abs().max())
    print(f"greatest difference of scores to eager: {error:.0e}")
    print("the paper: strict accuracy of 68.75 on MJ-BENCH-VIDEO, of its base 5.93")


if __name__ == "__main__":
    main()
