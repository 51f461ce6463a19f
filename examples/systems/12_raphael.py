"""System 12, RAPHAEL: text-to-image diffusion whose U-Net blocks choose experts by the timestep and
by the words of the prompt, arXiv 2305.18295.

A block is self-attention, cross-attention, time-MoE and space-MoE:

    time    h' = te_r(h),  r = argmax softmax(G'(E'(t)))                  one expert per image
    space   1/n sum_i se_route(y_i)(h' * M_i),  route(y_i) = argmax softmax(G(y_i))

where M_i is 1 if the cross-attention map of token i is at least alpha times its maximum. The noise
that the paper adds to the gates is only for training. Sampling runs the U-Net once per step. The
routes of a prompt are the same in all steps, and the routes of a step depend only on its time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Sizes:
    """`side` is the size of a latent with `channels`; there is a width per level, and text [n_y,
    d_y]."""

    side: int = 8
    channels: int = 1
    widths: tuple[int, ...] = (32, 64)
    heads: int = 4
    tokens: int = 6
    text: int = 32
    time_experts: int = 4
    space_experts: int = 6
    alpha: float = 0.2
    steps: int = 1000


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def angles(t: Tensor, width: int) -> Tensor:
    """[B] -> [B, width]: sines and cosines of the timestep."""
    rates = torch.exp(-torch.arange(width // 2) * (9.21 / (width // 2)))
    phase = t[:, None].float() * rates
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:  # [B, N, W]
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in self.qkv(self.norm(h)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + self.out(y)


class CrossAttention(nn.Module):
    """h[B, N, W], text[B, n, d] -> h + attention, and the attention map M [B, n, N]."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(text, width), nn.Linear(text, width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.query(self.norm(h)) @ self.key(text).transpose(1, 2) * h.shape[-1] ** -0.5
        shares = scores.softmax(-1)
        return h + self.out(shares @ self.value(text)), shares.transpose(1, 2)


class TimeMoE(nn.Module):
    """h[B, N, W], time[B, W'] -> [B, N, W]: each image goes to the expert of its timestep."""

    def __init__(self, width: int, time: int, experts: int) -> None:
        super().__init__()
        self.gate = feed_forward_gate(time, experts)
        self.experts = nn.ModuleList(feed_forward(width) for _ in range(experts))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        route = self.gate(time).softmax(-1).argmax(-1)
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            y = y + (route == number)[:, None, None] * expert(h)
        return y


class SpaceMoE(nn.Module):
    """h[B, N, W], text[B, n, d], map[B, n, N] -> [B, N, W]: the region of each word goes to its
    expert."""

    def __init__(self, width: int, text: int, experts: int, alpha: float) -> None:
        super().__init__()
        self.gate = feed_forward_gate(text, experts)
        self.experts = nn.ModuleList(feed_forward(width) for _ in range(experts))
        self.alpha = alpha

    def forward(self, h: Tensor, text: Tensor, attention: Tensor) -> Tensor:
        route = self.gate(text).softmax(-1).argmax(-1)
        region = (attention >= self.alpha * attention.amax(-1, keepdim=True)).to(h.dtype)
        masked = h[:, None] * region[..., None]
        each = torch.zeros_like(masked)
        for number, expert in enumerate(self.experts):
            each = each + (route == number)[..., None, None] * expert(masked)
        return each.mean(1)


def feed_forward_gate(width: int, experts: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, experts))


class Block(nn.Module):
    def __init__(self, width: int, time: int, sizes: Sizes) -> None:
        super().__init__()
        self.shift = nn.Linear(time, width)
        self.self_attention = SelfAttention(width, sizes.heads)
        self.cross_attention = CrossAttention(width, sizes.text)
        self.before_time, self.before_space = nn.LayerNorm(width), nn.LayerNorm(width)
        self.time_moe = TimeMoE(width, time, sizes.time_experts)
        self.space_moe = SpaceMoE(width, sizes.text, sizes.space_experts, sizes.alpha)

    def forward(self, h: Tensor, text: Tensor, time: Tensor) -> Tensor:
        h = self.self_attention(h + self.shift(time)[:, None])
        h, attention = self.cross_attention(h, text)
        h = h + self.time_moe(self.before_time(h), time)
        return h + self.space_moe(self.before_space(h), text, attention)


class UNet(nn.Module):
    """x[B, C, side, side], text[B, n, d], t[B] -> the noise in x, [B, C, side, side]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        first, self.time_width = sizes.widths[0], 4 * sizes.widths[0]
        self.time = nn.Sequential(
            nn.Linear(first, self.time_width),
            nn.SiLU(),
            nn.Linear(self.time_width, self.time_width),
        )
        self.first = first
        self.entry = nn.Conv2d(sizes.channels, first, 3, padding=1)
        self.down = nn.ModuleList(Block(w, self.time_width, sizes) for w in sizes.widths)
        self.narrow = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1)
            for a, b in zip(sizes.widths, sizes.widths[1:], strict=False)
        )
        self.up = nn.ModuleList(Block(w, self.time_width, sizes) for w in sizes.widths[::-1])
        self.widen = nn.ModuleList(
            nn.Conv2d(b, a, 3, padding=1)
            for a, b in list(zip(sizes.widths, sizes.widths[1:], strict=False))[::-1]
        )
        self.leave = nn.Conv2d(first, sizes.channels, 3, padding=1)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        time = self.time(angles(t, self.first))
        h, skips = self.entry(x), []
        for level, block in enumerate(self.down):
            if level:
                h = self.narrow[level - 1](h)
            h = on_pixels(block, h, text, time)
            skips.append(h)
        for level, block in enumerate(self.up):
            if level:
                h = self.widen[level - 1](h.repeat_interleave(2, -2).repeat_interleave(2, -1))
            h = on_pixels(block, h + skips.pop(), text, time)
        return self.leave(h)


def on_pixels(block: Block, h: Tensor, text: Tensor, time: Tensor) -> Tensor:
    """Applies a block to [B, W, side, side], viewed as [B, side * side, W]."""
    pixels = block(h.flatten(2).transpose(1, 2), text, time)
    return pixels.transpose(1, 2).reshape(h.shape)


@dataclass(frozen=True)
class Schedule:
    """The share of the image's signal at each step of the noising: f32[steps]."""

    left: Tensor

    @staticmethod
    def linear(steps: int) -> Schedule:
        return Schedule(torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps), 0))

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        share = self.left[t][:, None, None, None]
        return share.sqrt() * x + (1 - share).sqrt() * noise

    def back(self, x: Tensor, noise: Tensor, t: int, before: int) -> Tensor:
        """A deterministic DDIM step, from step t to step `before` (-1: to the image)."""
        share = self.left[t]
        target = self.left[before] if before >= 0 else torch.ones(())
        picture = (x - (1 - share).sqrt() * noise) / share.sqrt()
        return target.sqrt() * picture + (1 - target).sqrt() * noise


def times(steps: int, count: int) -> list[tuple[int, int]]:
    """`count` of the steps from the last to the first, each with its successor."""
    chosen = [round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)][::-1]
    return list(zip(chosen, [*chosen[1:], -1], strict=True))


def sample(model: UNet, x: Tensor, text: Tensor, schedule: Schedule, count: int) -> Tensor:
    """Eager sampling: gates are evaluated in every block of every step."""
    for t, before in times(len(schedule.left), count):
        x = schedule.back(x, model(x, text, torch.full((len(x),), t)), t, before)
    return x


@dataclass
class Calls:
    """The number of router calls, by what the routers read."""

    text: int = 0
    time: int = 0


def sample_hoisted(
    artifact: moec.CompiledModel, x: Tensor, text: Tensor, schedule: Schedule, count: int
) -> tuple[Tensor, Calls]:
    """Sampling with hoisted routers: the routes of the text once, those of the time once per step,
    and the rest by the artifact."""
    calls = Calls()
    by_text = artifact.routers(text=text)
    calls.text += len(by_text)
    for t, before in times(len(schedule.left), count):
        now = torch.full((len(x),), t)
        by_time = artifact.routers(t=now)
        calls.time += len(by_time)
        noise = artifact.routed({**by_text, **by_time}, x, text, now)
        x = schedule.back(x, noise, t, before)
    return x, calls


def compiled(model: UNet, sizes: Sizes) -> moec.CompiledModel:
    """The artifact for any number of images, with its routers as separate functions."""
    pictures = {0: torch.export.Dim("B", min=1, max=64)}
    shape = (2, sizes.channels, sizes.side, sizes.side)
    example = (torch.randn(shape), torch.randn(2, sizes.tokens, sizes.text), torch.tensor([3, 500]))
    return moec.compile(
        model.eval(), example, dynamic_shapes=(pictures,) * 3, passes="+hoist-routers"
    )


def train(model: UNet, sizes: Sizes, schedule: Schedule, steps: int) -> list[float]:
    """The loss of each step on scikit-learn's digits, with learned vectors as prompts. The paper's
    other losses (edges for the attention maps) are not included."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    prompts = prompts_of(sizes)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))
        x = F.interpolate(images[rows], size=(sizes.side, sizes.side), mode="area")
        t = torch.randint(len(schedule.left), (32,))
        noise = torch.randn_like(x)
        prompt = prompts[torch.tensor(data.target)[rows]]
        loss = F.mse_loss(model(schedule.noised(x, noise, t), prompt, t), noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def prompts_of(sizes: Sizes) -> Tensor:
    """A fixed random text for each digit, f32[10, n_y, d_y]: there is no text encoder here."""
    chance = torch.Generator().manual_seed(1)
    return torch.randn(10, sizes.tokens, sizes.text, generator=chance)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A space-MoE over 16 x 16 latents and the paper's 77 words of width 1024. We did not find the
    width of the image features; it is that of Stable Diffusion's first level."""
    width, pixels, words = 320, 256, 77
    moe = SpaceMoE(width, 1024, experts=6, alpha=0.2).eval()
    attention = torch.randn(1, words, pixels).softmax(1)
    return moe, (torch.randn(1, pixels, width), torch.randn(1, words, 1024), attention)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    torch.manual_seed(0)
    sizes = Sizes(widths=(16, 32), tokens=4, time_experts=3, space_experts=4)
    model, schedule = UNet(sizes), Schedule.linear(sizes.steps)
    losses = train(model, sizes, schedule, 20)
    print(f"loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.2f} in {len(losses)} steps")
    artifact = compiled(model, sizes)
    for block in artifact.blocks:
        print(f"  {block.name}: {block.experts} experts, {block.router}")
    steps, text = 10, prompts_of(sizes)[:4]
    start = torch.randn(4, sizes.channels, sizes.side, sizes.side)
    with torch.no_grad():
        expected = sample(model, start, text, schedule, steps)
    latents, calls = sample_hoisted(artifact, start, text, schedule, steps)
    depth, error = 2 * len(sizes.widths), float((latents - expected).abs().max())
    print(f"{steps} steps, {depth} blocks: latents differ from eager by {error:.0e}")
    print(f"text gates evaluated: eager {steps * depth}, hoisted {calls.text}")
    print(
        f"time gates evaluated: {steps * depth}, out of the blocks: {calls.time} in {steps} calls"
    )
    space = sizes.space_experts**depth
    print(f"spatial paths here: {space:,}; the paper's 16 blocks: {6**16:,}")


if __name__ == "__main__":
    main()
