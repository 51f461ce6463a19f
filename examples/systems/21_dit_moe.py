"""DiT-MoE (arXiv 2407.11633): images by diffusion, with sparse feed-forward layers in every block.

Each block normalises its tokens, shifts and scales them by the time step and the class
(adaLN-Zero), attends, and adds two of N SwiGLU experts and one shared expert. The experts are
weighted by their softmax probabilities, which are not renormalised. They are evaluated as in the
authors' code: choices are sorted by expert, their counts read into Python, then a loop runs the
experts and adds the results to the tokens.

Sampling runs the compiled denoiser once per step, for the classes and for no class together
(classifier-free guidance). The modulations of all blocks depend only on the step and the class:
they are a separate program, evaluated for all steps in one call before the first.

    python examples/systems/21_dit_moe.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Size:
    """The sizes of a model; `side` is that of the latent image, in latent pixels."""

    layers: int
    width: int
    heads: int
    experts: int
    top_k: int = 2
    side: int = 32
    channels: int = 4
    patch: int = 2
    classes: int = 1000

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


SMALL = Size(layers=2, width=32, heads=2, experts=4, side=8, channels=1, classes=10)
S_2_8E2A = Size(layers=12, width=384, heads=6, experts=8)
B_2_8E2A = Size(layers=12, width=768, heads=12, experts=8)
PUBLISHED = {  # table 1: total and active parameters in millions, GFLOPs for 256 x 256 pixels
    "S/2-8E2A": (S_2_8E2A, 199, 71, 15.43),
    "S/2-16E2A": (Size(12, 384, 6, 16), 369, 71, 15.44),
    "B/2-8E2A": (B_2_8E2A, 795, 286, 61.68),
    "L/2-8E2A": (Size(24, 1024, 16, 8), 2_800, 1_000, 219.26),
    "XL/2-8E2A": (Size(28, 1152, 16, 8), 4_100, 1_500, 323.74),
    "G/2-16E2A": (Size(40, 1408, 16, 16), 16_500, 3_100, 690.94),
}


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class SparseFeedForward(nn.Module):
    """x [B, S, D] -> [B, S, D]. In training, `balance` is the balance loss of the last call."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.top_k = size.top_k
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(size.width, 4 * size.width) for _ in range(size.experts)
        )
        self.shared = SwiGLU(size.width, 2 * size.width)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows).softmax(dim=-1)
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.training:
            counts = torch.bincount(experts.flatten(), minlength=len(self.experts))
            share = counts * len(self.experts) / experts.numel()
            self.balance = (share * scores.mean(0)).sum()
        y = self.routed(rows, experts.flatten(), weights.reshape(-1, 1)) + self.shared(rows)
        return y.reshape(x.shape)

    def routed(self, rows: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """rows [T, D], experts [T*k], weights [T*k, 1] -> [T, D]."""
        order = experts.argsort()
        ends = experts.bincount(minlength=len(self.experts)).cumsum(0).cpu().numpy()
        tokens = order // self.top_k
        y = torch.zeros_like(rows)
        for number, end in enumerate(ends):
            start = 0 if number == 0 else ends[number - 1]
            if start == end:
                continue
            token = tokens[start:end]
            result = self.experts[number](rows[token]) * weights[order[start:end]]
            y.index_add_(0, token, result)
        return y


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """x [B, S, D], modulation [B, 6 * D] -> [B, S, D]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.LayerNorm(size.width, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.attention, self.moe = Attention(size), SparseFeedForward(size)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.moe(modulate(self.norm2(x), shift2, scale2))
        return x


def frequencies(steps: Tensor, count: int = 256) -> Tensor:
    """Time steps [B] -> cosines and sines [B, count]."""
    half = count // 2
    angles = steps[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Conditions(nn.Module):
    """Time steps [B], classes [B] -> modulations of all blocks [B, L, 6 * D] and of the final layer
    [B, 2 * D]. The class with id `classes` means no class, as guidance needs it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(size.classes + 1, width)
        self.blocks = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(size.layers))
        self.end = nn.Linear(width, 2 * width)

    def forward(self, steps: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        c = F.silu(self.time(frequencies(steps)) + self.classes(classes))
        return torch.stack([block(c) for block in self.blocks], dim=1), self.end(c)


def positions(size: Size) -> Tensor:
    """Cosines and sines of rows and columns: [S, D]."""
    side = torch.arange(size.side // size.patch).float()
    row, column = torch.meshgrid(side, side, indexing="ij")
    count = size.width // 4
    turns = 10_000 ** -(torch.arange(count) / count)
    angles = [axis.reshape(-1, 1) * turns for axis in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)


class Denoiser(nn.Module):
    """Latent images [B, C, side, side], their modulations -> noise, variance [B, 2 * C, ..]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.patches = nn.Conv2d(size.channels, size.width, size.patch, stride=size.patch)
        self.register_buffer("positions", positions(size))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, elementwise_affine=False, eps=1e-6)
        self.out = nn.Linear(size.width, size.patch**2 * 2 * size.channels)

    def forward(self, image: Tensor, modulations: Tensor, end: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for number, block in enumerate(self.blocks):
            x = block(x, modulations[:, number])
        shift, scale = end.chunk(2, dim=1)
        x = self.out(modulate(self.norm(x), shift, scale))
        rows, p = self.size.side // self.size.patch, self.size.patch
        x = x.view(x.shape[0], rows, rows, p, p, 2 * self.size.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, rows * p, rows * p)


class DiTMoE(nn.Module):
    """image [B, C, side, side], steps [B], classes [B] -> noise, variance [B, 2 * C, side, side].

    The weights are random. Weights that end residual branches, zero at the start of training, are
    random too: otherwise there would be nothing to compare.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.conditions, self.denoiser = Conditions(size), Denoiser(size)

    def forward(self, image: Tensor, steps: Tensor, classes: Tensor) -> Tensor:
        y: Tensor = self.denoiser(image, *self.conditions(steps, classes))
        return y


@dataclass(frozen=True)
class Schedule:
    """Some of the 1000 time steps of training, the noisiest first: `steps` [n], the remaining
    shares of signal `signal` [n], and the noise that each step removes, `betas` [n]."""

    steps: Tensor
    signal: Tensor
    betas: Tensor

    @staticmethod
    def of(count: int, total: int = 1000) -> Schedule:
        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, total), dim=0)
        steps = torch.linspace(total - 1, 0, count).long()
        before = torch.cat([signal[steps[1:]], torch.ones(1)])
        return Schedule(steps, signal[steps], 1 - signal[steps] / before)


Conditioning = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Denoising = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample(
    conditions: Conditioning,
    denoiser: Denoising,
    size: Size,
    classes: Tensor,
    schedule: Schedule,
    guidance: float = 4.0,
    seed: int = 0,
) -> Tensor:
    """Latent images [B, C, side, side] of `classes` [B], by ancestral sampling.

    One call of `conditions` gives the modulations of all steps. Then each step calls `denoiser`
    once, with every image twice: for its class, and for no class.
    """
    generator, count = torch.Generator().manual_seed(seed), len(classes)
    both = torch.cat([classes, torch.full_like(classes, size.classes)])
    modulations, ends = conditions(
        schedule.steps.repeat_interleave(2 * count), both.repeat(len(schedule.steps))
    )
    x = torch.randn(count, size.channels, size.side, size.side, generator=generator)
    for step, (signal, beta) in enumerate(zip(schedule.signal, schedule.betas, strict=True)):
        rows = slice(2 * count * step, 2 * count * (step + 1))
        y = denoiser(torch.cat([x, x]), modulations[rows], ends[rows])
        (noise, none), (spread, _) = (part.chunk(2) for part in y.chunk(2, dim=1))
        noise = none + guidance * (noise - none)
        image = (x - (1 - signal).sqrt() * noise) / signal.sqrt()
        before = signal / (1 - beta)
        mean = (before.sqrt() * beta * image + (1 - beta).sqrt() * (1 - before) * x) / (1 - signal)
        if step == len(schedule.steps) - 1:
            return mean
        least = beta * (1 - before) / (1 - signal)
        share = (spread + 1) / 2
        deviation = (share * beta.log() + (1 - share) * least.log()).mul(0.5).exp()
        x = mean + deviation * torch.randn(x.shape, generator=generator)
    raise ValueError("a schedule has at least one step")


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's images of digits in [-1, 1], as latents [N, 1, 8, 8], and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(
        data.target
    )


def train(model: DiTMoE, steps: int, alpha: float = 0.01) -> list[float]:
    """Trains the model to predict the noise in noisy digits. Returns the losses.

    alpha weights the balance loss of the experts, sum_i f_i P_i: the paper has 0.005, the authors'
    code 0.01.
    """
    images, classes = digits()
    size, signal = model.denoiser.size, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        step, noise = torch.randint(1000, (32,)), torch.randn(32, *images.shape[1:])
        share = signal[step].view(-1, 1, 1, 1)
        noisy = share.sqrt() * images[batch] + (1 - share).sqrt() * noise
        label = torch.where(torch.rand(32) < 0.1, size.classes, classes[batch])
        y = model(noisy, step, label)
        loss = F.mse_loss(y[:, : size.channels], noise)
        balance = torch.stack([block.moe.balance for block in model.denoiser.blocks]).mean()
        adam.zero_grad()
        (loss + alpha * balance).backward()
        adam.step()
        losses.append(loss.item())
    model.eval()
    return losses


def compiled_parts(model: DiTMoE) -> tuple[moec.CompiledModel, moec.CompiledModel]:
    """The conditions and the denoiser as artifacts for any number of images."""
    size, batch = model.denoiser.size, torch.export.Dim("B")
    steps, classes = torch.tensor([999, 500, 3]), torch.tensor([1, 7, size.classes])
    conditions = moec.compile(model.conditions, (steps, classes), dynamic_shapes=({0: batch},) * 2)
    with torch.no_grad():
        modulations = model.conditions(steps, classes)
    inputs = (torch.randn(3, size.channels, size.side, size.side), *modulations)
    return conditions, moec.compile(model.denoiser, inputs, dynamic_shapes=({0: batch},) * 3)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The sparse layer of S/2-8E2A, for the tokens of two images."""
    return SparseFeedForward(S_2_8E2A).eval(), (torch.randn(2, S_2_8E2A.tokens, S_2_8E2A.width),)


def gigaflops(size: Size) -> float:
    """Multiply-adds of linear layers per image, in billions, as counted in table 1."""
    width, tokens = size.width, size.tokens
    active = (4 + 12 * size.top_k + 6) * width**2 + width * size.experts
    ends = 3 * size.channels * size.patch**2 * width
    once = size.layers * 6 * width**2 + (256 + width + 2 * width) * width
    return (tokens * (size.layers * active + ends) + once) / 1e9


def parameters(size: Size) -> tuple[int, int]:
    """The numbers of all parameters, and of those that one token uses; nothing is allocated."""
    with torch.device("meta"):
        model = DiTMoE(size)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(
        p.numel() for block in model.denoiser.blocks for p in block.moe.experts.parameters()
    )
    return total, total - experts * (size.experts - size.top_k) // size.experts


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    print("size          parameters (paper)   active (paper)   GFLOPs (paper)")
    for name, (size, total, active, flops) in PUBLISHED.items():
        ours = parameters(size)
        print(
            f"{name:10}{ours[0] / 1e6:10.0f} M ({total:6,} M){ours[1] / 1e6:9.0f} M ({active:5,} M)"
            f"{gigaflops(size):10.2f} ({flops})"
        )

    torch.manual_seed(0)
    model = DiTMoE(SMALL)
    losses = train(model, steps=150)
    last = sum(losses[-20:]) / 20
    print(f"\ntrained on digits: error of the noise {losses[0]:.2f}, then {last:.2f}")

    conditions, denoiser = compiled_parts(model)
    for block in denoiser.blocks:
        print(
            f"{block.name}: top {block.top_k} of {block.experts} experts, {block.activation}, "
            f"{block.router}, shared expert {block.shared}, written as {block.form}"
        )
    schedule, labels = Schedule.of(20), torch.arange(4)
    with torch.no_grad():
        eager = sample(model.conditions, model.denoiser, SMALL, labels, schedule)
    ours = sample(conditions, denoiser, SMALL, labels, schedule)
    error = float((eager - ours).abs().max() / eager.abs().max())
    print(f"{len(labels)} images in {len(schedule.steps)} guided steps: {error:.0e} from eager's")


if __name__ == "__main__":
    main()
