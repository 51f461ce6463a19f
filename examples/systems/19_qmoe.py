"""QMoE (arXiv 2310.16795): experts of a Switch transformer in less than one bit per weight.

A Switch transformer is an encoder and a decoder (T5's form) in which every second feed-forward
layer, or every one, has many experts. A token goes to the expert with the greatest probability,
which scales the result. The weights of experts become ternary, {min, 0, max} of their row, solved
on the tokens that the router sends to the expert (GPTQ); about 88 % are zero. Codewords of 16 bits
from one dictionary for all layers encode 2 to 28 weights each, and products decode them on the fly.

    python examples/systems/19_qmoe.py
    python examples/systems/19_qmoe.py --published    counts the models of the paper

benchmarks/layers/ternary.py compares the decoding products with bf16, at the paper's shapes.
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
from moec.ir.formats.ternary import decode, encode

ZEROS = 0.885  # the share of zeros that the dictionary assumes
LENGTH = 10  # of the small texts
SHAPES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080))


@dataclass(frozen=True)
class Size:
    layers: int  # of the encoder and of the decoder each
    width: int
    heads: int
    head: int
    hidden: int
    experts: int
    words: int = 32_128
    every: int = 2  # every n-th layer has experts


SMALL = Size(layers=2, width=32, heads=2, head=16, hidden=64, experts=4, words=64)
PUBLISHED = {  # gigabytes of the model in bf16, table 6
    "base128": (Size(12, 768, 12, 64, 3072, 128), 14.9),
    "large128": (Size(24, 1024, 16, 64, 4096, 128), 52.7),
    "c2048": (Size(15, 2080, 64, 64, 6144, 2048, every=1), 3142),
}


class FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.up = nn.Linear(size.width, size.hidden, bias=False)
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class Switch(nn.Module):
    """x [B, S, D] -> [B, S, D]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(size) for _ in range(size.experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        probability, expert = self.router(rows).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(rows)
        for number, module in enumerate(self.experts):
            (token,) = torch.where(expert == number)
            y.index_add_(0, token, module(rows[token]))
        return (probability[:, None] * y).reshape(x.shape)


class Attention(nn.Module):
    """T5's attention: queries are not scaled; `bias` [heads, Q, K] is added to the scores."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head, inner = size.head, size.heads * size.head
        self.query, self.key, self.value = (
            nn.Linear(size.width, inner, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(inner, size.width, bias=False)

    def forward(self, x: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            linear(source).view(*source.shape[:2], -1, self.head).transpose(1, 2)
            for linear, source in ((self.query, x), (self.key, keys), (self.value, keys))
        )
        scores = q @ k.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        y: Tensor = self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        return y


class Layer(nn.Module):
    """x [B, S, D], and for a decoder source [B, S2, D] -> [B, S, D]."""

    def __init__(self, size: Size, decodes: bool, sparse: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(size.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(size)
        self.cross = Attention(size) if decodes else None
        self.norm3 = nn.RMSNorm(size.width, eps=1e-6) if decodes else None
        self.mlp = Switch(size) if sparse else FeedForward(size)

    def forward(self, x: Tensor, bias: Tensor, source: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, bias)
        if self.cross is not None and self.norm3 is not None and source is not None:
            x = x + self.cross(self.norm3(x), source, None)
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """An encoder or a decoder: x [B, S, D] -> [B, S, D]."""

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, size: Size, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        self.bias = nn.Embedding(self.BUCKETS, size.heads)
        self.layers = nn.ModuleList(
            Layer(size, decodes, sparse=number % size.every == size.every - 1)
            for number in range(size.layers)
        )
        self.norm = nn.RMSNorm(size.width, eps=1e-6)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[1])
        distance = positions[None, :] - positions[:, None]  # of keys from queries
        bias = self.bias(self.buckets(distance)).permute(2, 0, 1)
        if self.decodes:
            bias = bias.masked_fill(distance > 0, -math.inf)
        for layer in self.layers:
            x = layer(x, bias, source)
        y: Tensor = self.norm(x)
        return y

    def buckets(self, distance: Tensor) -> Tensor:
        """T5's buckets: one per near distance, and logarithmic ranges for far ones."""
        count = self.BUCKETS if self.decodes else self.BUCKETS // 2
        first = (distance > 0).long() * count if not self.decodes else 0
        distance = -distance.clamp(max=0) if self.decodes else distance.abs()
        exact = count // 2
        far = torch.log(distance.clamp(min=1) / exact) / math.log(self.FARTHEST / exact)
        far = (exact + far * (count - exact)).long().clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)


class SwitchTransformer(nn.Module):
    """input_ids [B, S1], decoder_ids [B, S2] -> logits [B, S2, words]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.words, size.width)
        self.encoder, self.decoder = Stack(size, decodes=False), Stack(size, decodes=True)
        self.head = nn.Linear(size.width, size.words, bias=False)
        nn.init.normal_(self.embed.weight, std=size.width**-0.5)

    def forward(self, input_ids: Tensor, decoder_ids: Tensor) -> Tensor:
        source = self.encoder(self.embed(input_ids))
        y: Tensor = self.head(self.decoder(self.embed(decoder_ids), source))
        return y


def parameters(size: Size) -> tuple[int, int]:
    """The numbers of all parameters and of those of experts; nothing is allocated. Only one layer
    of each kind is built, because even without memory a trillion parameters need many small
    modules."""
    with torch.device("meta"):
        one = SwitchTransformer(Size(**{**vars(size), "layers": size.every, "experts": 1}))
    groups = size.layers // size.every
    layers = [layer for stack in (one.encoder, one.decoder) for layer in stack.layers]
    repeated = sum(p.numel() for layer in layers for p in layer.parameters())
    rest = sum(p.numel() for p in one.parameters()) - repeated
    expert = 2 * size.width * size.hidden
    sparse = 2 * groups
    experts = sparse * size.experts * expert
    routers = sparse * (size.experts - 1) * size.width
    return rest + groups * repeated + routers + experts - sparse * expert, experts


def independent(rows: int, width: int, seed: int = 0) -> Tensor:
    """Codes u8[rows, width], each 0 with probability `ZEROS`, else 1 or 2."""
    drawn = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    half = (1 - ZEROS) / 2
    return (drawn >= ZEROS).to(torch.uint8) + (drawn >= ZEROS + half).to(torch.uint8)


def times_smaller(codes: Tensor) -> float:
    """The bytes in bf16 divided by those of codewords, the starts of rows, and two bf16 numbers per
    row."""
    return 2 * codes.numel() / (encode(codes).nbytes + 4 * len(codes))


def batch(size: Size, count: int, length: int, seed: int) -> dict[str, Tensor]:
    """Repeating sequences: the decoder must output what the encoder reads, one step later."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, size.words // 2, (count, length), generator=generator) * 2
    start = torch.zeros(count, 1, dtype=torch.long)
    return {"input_ids": ids, "decoder_ids": torch.cat([start, ids[:, :-1]], dim=1)}


def train(model: SwitchTransformer, size: Size, steps: int) -> list[float]:
    """Trains the copying task, so that weights are not random. Returns the losses."""
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        inputs = batch(size, 16, LENGTH, step)
        logits = model(**inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def compress(model: nn.Module, size: Size) -> moec.CompiledModel:
    """The model with ternary experts, solved on a few batches, compiled to code that multiplies
    compressed weights, for any number of texts of one length."""
    texts = torch.export.Dim("B")
    return moec.compile(
        model,
        tuple(batch(size, 3, LENGTH, seed=1_000_000).values()),
        dynamic_shapes=({0: texts}, {0: texts}),
        passes="+compress-experts",
        calib=batch(size, 16, LENGTH, seed=2_000_000),
        kv_cache=False,
    )


def count() -> None:
    print("model        bf16: here    the paper   experts' share")
    for name, (size, paper) in PUBLISHED.items():
        total, experts = parameters(size)
        print(f"{name:10}{2 * total / 1e9:10,.1f} GB{paper:10,.1f} GB{experts / total:12.1%}")


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """16 of the 128 experts of a layer of base128, not compressed, over 256 tokens, for
    benchmarks/systems."""
    size = replace(PUBLISHED["base128"][0], experts=16)
    return Switch(size).eval(), (torch.randn(1, 256, size.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", action="store_true", help="count the published sizes")
    if parser.parse_args(arguments).published:
        count()
        return
    for rows, width in SHAPES:
        codes = independent(rows, width)
        exact = torch.equal(decode(encode(codes), rows, width), codes)
        smaller = times_smaller(codes)
        print(f"{rows:5} x {width:<5} {smaller:5.2f} times smaller, decoded exactly: {exact}")
    print("the paper: 21.11 times on sampled matrices, with other row starts; the limit is 25.40\n")

    torch.manual_seed(0)
    model = SwitchTransformer(SMALL)
    losses = train(model, SMALL, steps=60)
    print(f"trained to copy: loss {losses[0]:.2f}, then {losses[-1]:.2f}")
    compiled = compress(model.to(torch.bfloat16), SMALL)
    for block in compiled.blocks:
        print(f"{block.name}: {block.experts} experts, {block.router}, written as {block.form}")
    for damage in compiled.report().damage:
        for line in damage.layers:
            print(f"  {line.layer}: {line.says}")
    for checked in compiled.report().verification:
        print(f"against eager with the decoded weights: {checked.error:.0e}")


if __name__ == "__main__":
    main()
