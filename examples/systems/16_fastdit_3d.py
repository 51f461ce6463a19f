"""System 16, FastDiT-3D: a diffusion transformer for voxels that is trained with nearly all patches
masked, arXiv 2312.07231.

The encoder sees only the patches that are kept. Its FFNs have experts, so different categories use
different weights. The decoder sees all patches, with a learned vector for masked ones, and attends
within windows of voxels. Foreground and background have separate masking rates. Sampling keeps
every patch. moec compiles the encoder once for any number of kept patches.

We did not find the authors' code nor the numbers of experts; 4 experts with 2 per token are chosen
here. The example is trained on categories of artificial voxels (balls, boxes, crosses).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Sizes:
    """A cube of `side` voxels with patches of `patch`, and windows of `window` patches per side."""

    side: int = 16
    patch: int = 4
    window: int = 2
    width: int = 64
    heads: int = 4
    encoder: int = 2
    decoder: int = 1
    experts: int = 4
    top_k: int = 2
    classes: int = 3
    steps: int = 100

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @property
    def patches(self) -> int:
        return self.grid**3


PUBLISHED = Sizes(
    side=128, patch=4, window=4, width=384, heads=6, encoder=12, decoder=4, classes=55
)
"""128^3 voxels and 55 categories of ShapeNet are from the paper; widths and depths are DiT-S's."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SparseFFN(nn.Module):
    """x[B, N, D] -> [B, N, D]: softmax over the experts, the K most likely, not renormalised."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d = sizes.width
        self.gate = nn.Linear(d, sizes.experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
            for _ in range(sizes.experts)
        )
        self.top_k = sizes.top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, ids = self.gate(tokens).softmax(-1).topk(self.top_k, dim=-1)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            share = (weights * (ids == number)).sum(-1, keepdim=True)
            y = y + share * expert(tokens)
        return y.reshape(x.shape)


class Block(nn.Module):
    """A DiT block: shift, scale and gate of its norms are computed from the condition c[B, D]."""

    def __init__(self, sizes: Sizes, ffn: nn.Module, window: int = 0) -> None:
        super().__init__()
        d = sizes.width
        self.norms = nn.ModuleList(nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))
        self.attention, self.ffn = Attention(d, sizes.heads), ffn
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.window, self.grid = window, sizes.grid

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attend(self.norms[0](x) * (1 + scale) + shift)
        return x + gate2 * self.ffn(self.norms[1](x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over all patches or, in the decoder, within windows of the cube."""
        if not self.window:
            return self.attention(x)
        n, w, d = self.grid // self.window, self.window, x.shape[-1]
        cube = x.reshape(-1, n, w, n, w, n, w, d).permute(0, 1, 3, 5, 2, 4, 6, 7)
        cube = self.attention(cube.reshape(-1, w**3, d)).reshape(-1, n, n, n, w, w, w, d)
        return cube.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape)


class FastDiT3D(nn.Module):
    """voxels[B, side, side, side], t[B], label[B], keep[B, K] -> the noise, as voxels.

    `keep` has the indices of the patches that the encoder sees.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d, self.sizes = sizes.width, sizes
        self.entry = nn.Linear(sizes.patch**3, d)
        self.place = nn.Parameter(torch.randn(sizes.patches, d) / 10)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.label = nn.Embedding(sizes.classes, d)
        self.masked = nn.Parameter(torch.zeros(d))
        self.encoder = nn.ModuleList(Block(sizes, SparseFFN(sizes)) for _ in range(sizes.encoder))
        self.decoder = nn.ModuleList(
            Block(
                sizes,
                nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)),
                sizes.window,
            )
            for _ in range(sizes.decoder)
        )
        self.leave = nn.Linear(d, sizes.patch**3)

    def forward(self, voxels: Tensor, t: Tensor, label: Tensor, keep: Tensor) -> Tensor:
        c = self.time(angles(t, self.sizes.width)) + self.label(label)
        patches = self.entry(to_patches(voxels, self.sizes)) + self.place
        picked = keep[..., None].expand(-1, -1, patches.shape[-1])
        x = patches.gather(1, picked)
        for block in self.encoder:
            x = block(x, c)
        every = self.masked.expand_as(patches).scatter(1, picked, x) + self.place
        for block in self.decoder:
            every = block(every, c)
        return to_voxels(self.leave(every), self.sizes)


def angles(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width]: sines and cosines of the timestep."""
    rates = torch.exp(-torch.arange(width // 2) * (9.21 / (width // 2)))
    phase = t[:, None].float() * rates
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def to_patches(voxels: Tensor, sizes: Sizes) -> Tensor:
    n, p = sizes.grid, sizes.patch
    cube = voxels.reshape(-1, n, p, n, p, n, p).permute(0, 1, 3, 5, 2, 4, 6)
    return cube.reshape(-1, n**3, p**3)


def to_voxels(patches: Tensor, sizes: Sizes) -> Tensor:
    n, p, side = sizes.grid, sizes.patch, sizes.side
    cube = patches.reshape(-1, n, n, n, p, p, p).permute(0, 1, 4, 2, 5, 3, 6)
    return cube.reshape(-1, side, side, side)


def draw_patches(voxels: Tensor, sizes: Sizes, foreground: float, background: float) -> Tensor:
    """The indices of the kept patches, i64[B, K], for these shares of patches with and without an
    object. Every sample keeps as many as the first one."""
    full = to_patches(voxels, sizes).amax(-1) > 0
    count = int(full[0].sum() * foreground + (~full[0]).sum() * background) or 1
    odds = torch.where(full, foreground, background)
    return torch.multinomial(odds, count).sort(-1).values


def shapes(count: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Voxels f32[count, side, side, side] in -1 to 1, and their categories (ball, box, cross)."""
    ticks = torch.linspace(-1, 1, sizes.side)
    x, y, z = torch.meshgrid(ticks, ticks, ticks, indexing="ij")
    label = torch.randint(3, (count,))
    size = 0.4 + 0.4 * torch.rand(count, 1, 1, 1)
    ball = (x**2 + y**2 + z**2).sqrt() < size
    box = torch.stack([x, y, z]).abs().amax(0) < 0.8 * size
    arms = torch.stack([x, y, z]).abs().sort(0).values
    cross = (arms[1] < 0.3 * size) & (arms[2] < 1.2 * size)
    full = torch.stack([ball, box, cross], dim=1)[torch.arange(count), label]
    return 2 * full.float() - 1, label


def shares(sizes: Sizes) -> Tensor:
    """The share of the signal at each step of the noising, f32[steps]."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.1, sizes.steps), 0)


def noised(voxels: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    share = share[:, None, None, None]
    return share.sqrt() * voxels + (1 - share).sqrt() * noise


def train(model: FastDiT3D, steps: int, foreground: float, background: float) -> list[float]:
    """The loss of each step, with these shares of patches kept."""
    sizes = model.sizes
    optimiser = torch.optim.Adam(model.train().parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        voxels, label = shapes(16, sizes)
        t = torch.randint(sizes.steps, (16,))
        noise = torch.randn_like(voxels)
        keep = draw_patches(voxels, sizes, foreground, background)
        predicted = model(noised(voxels, noise, shares(sizes)[t]), t, label, keep)
        loss = F.mse_loss(predicted, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def sample(
    model: Callable[..., Any], start: Tensor, label: Tensor, sizes: Sizes, count: int
) -> Tensor:
    """Deterministic DDIM with every patch kept; `model` is the module or its compiled model."""
    left, x = shares(sizes), start
    chosen = [round(i * (sizes.steps - 1) / max(count - 1, 1)) for i in range(count)][::-1]
    every = torch.arange(sizes.patches).expand(len(x), -1)
    for t, before in zip(chosen, [*chosen[1:], -1], strict=True):
        noise = model(x, torch.full((len(x),), t), label, every)
        target = left[before] if before >= 0 else torch.ones(())
        clean = (x - (1 - left[t]).sqrt() * noise) / left[t].sqrt()
        x = target.sqrt() * clean + (1 - target).sqrt() * noise
    return x


def example(sizes: Sizes, count: int, patches: int) -> tuple[Tensor, ...]:
    """Noise, timesteps, categories and `patches` kept patches of each."""
    side = sizes.side
    keep = torch.rand(count, sizes.patches).argsort(1)[:, :patches].sort(1).values
    return (
        torch.randn(count, side, side, side), torch.randint(sizes.steps, (count,)),
        torch.randint(sizes.classes, (count,)), keep,
    )  # fmt: skip


def compiled(model: FastDiT3D) -> moec.CompiledModel:
    """One artifact for any share of kept patches."""
    sizes = model.sizes
    b = torch.export.Dim("B", min=1, max=64)
    k = torch.export.Dim("K", min=1, max=sizes.patches)
    return moec.compile(
        model.eval(),
        example(sizes, 2, 10),
        dynamic_shapes=({0: b}, {0: b}, {0: b}, {0: b, 1: k}),
    )


def work(sizes: Sizes, share: float) -> float:
    """Multiplications of the encoder per sample if a `share` of the patches is kept."""
    n, d = share * sizes.patches, sizes.width
    return sizes.encoder * (n * d * d * (4 + 8 * sizes.top_k) + 2 * n * n * d)


class EncoderBlock(nn.Module):
    """x[B, K, D], c[B, D] -> [B, K, D]: one block of the encoder."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.block = Block(sizes, SparseFFN(sizes))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.block(x, c)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block of the encoder at the published sizes, with 1 % of the patches kept."""
    patches, width = PUBLISHED.patches // 100, PUBLISHED.width
    block = EncoderBlock(PUBLISHED).eval()
    return block, (torch.randn(1, patches, width), torch.randn(1, width))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes()
    model = FastDiT3D(sizes)
    losses = train(model, 30, foreground=0.5, background=0.1)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.2f} in {len(losses)} steps")
    artifact = compiled(model)
    for block in artifact.blocks:
        print(f"  {block.name}: {block.experts} experts, {block.router}")
    for share in (0.01, 0.05, 1.0):
        inputs = example(sizes, 2, max(1, round(share * sizes.patches)))
        with torch.no_grad():
            error = float((artifact(*inputs) - model(*inputs)).abs().max())
        print(f"{share:.0%} of the patches: differs from eager by {error:.0e}")
    start, label = torch.randn(3, *(sizes.side,) * 3), torch.arange(3)
    voxels = sample(artifact, start, label, sizes, 5)
    with torch.no_grad():
        expected = sample(model, start, label, sizes, 5)
    error = float((voxels - expected).abs().max())
    print(f"5 steps of sampling: voxels differ from eager by {error:.0e}")
    cost = work(PUBLISHED, 0.01) / work(PUBLISHED, 1.0)
    print(f"the encoder's work at the published sizes with 1 % of the patches: {cost:.2%} of all")
    print("the paper: 6.5 % of the cost of training, decoder and attention included")


if __name__ == "__main__":
    main()
