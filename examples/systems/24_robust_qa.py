"""24. Robust question answering: DistilBERT followed by experts (arXiv 2204.09598).

There are two heads over the last hidden states. The MoE head gives each token two experts. The
second is kept with a probability that increases with its gate. An expert takes C tokens of each
text; dropped choices give zero. The Switch head is an additional layer after DistilBERT with one
expert per token and at most C tokens per expert, chosen at random. Other tokens pass through
unchanged, and all are scaled by their probability. The authors' code draws random numbers at run
time (also in evaluation); they are an input here, so that results are reproducible.

    python examples/systems/24_robust_qa.py               # small, compiled, beside eager
    python examples/systems/24_robust_qa.py --published   # parameters on DistilBERT's shape
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


@dataclass(frozen=True)
class Config:
    """DistilBERT's shape, and the authors' experts."""

    layers: int = 6
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 30522
    context: int = 512
    experts: int = 8
    expert_hidden: int = 3072
    factor: float = 2.0  # of the capacity
    threshold: float = 0.2  # a second expert is kept with probability gate / threshold
    least: int = 4


SMALL = Config(1, 16, 2, 32, vocabulary=50, context=32, experts=4, expert_hidden=24, factor=1.25)
HEADS = ("moe", "switch")
PUBLISHED = {"DistilBERT": (Config(), 66.4)}


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """A layer of DistilBERT: attention and MLP, each followed by a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        self.mlp = MLP(config.width, config.hidden)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.mlp(x))


class Encoder(nn.Module):
    """Token ids [B, N] -> hidden states [B, N, D]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids) + self.positions(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x)
        return x


def before(mask: Tensor) -> Tensor:
    """How many earlier tokens of the text chose each expert: [B, N, E]."""
    return mask.cumsum(1) - mask


class MoE(nn.Module):
    """x [B, N, D], numbers in [0, 1) [B, N] -> [B, N, D]. Dropped choices give zero."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config.width, config.expert_hidden) for _ in range(config.experts)
        )
        self.loss = torch.zeros(())

    def route(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Combine weights [B, N, E, C], with at most C tokens of a text per expert."""
        c, n = self.config, x.shape[1]
        size = max(min(n, int(n * c.factor / c.experts)), c.least)
        gates = self.gate(x).softmax(-1)
        gate1, index1 = gates.max(-1)
        mask1 = F.one_hot(index1, c.experts).float()
        gate2, index2 = (gates * (1 - mask1)).max(-1)
        mask2 = F.one_hot(index2, c.experts).float()
        total = gate1 + gate2 + 1e-9
        gate1, gate2 = gate1 / total, gate2 / total
        if self.training:
            self.loss = (mask1.mean(1) * gates.mean(1)).mean() * c.experts**2
        mask2 = mask2 * (numbers < gate2 / max(c.threshold, 1e-9))[..., None].float()
        slot1 = before(mask1) * mask1
        mask1 = mask1 * (slot1 < size).float()
        count1 = mask1.sum(1, keepdim=True)
        fits1 = mask1.sum(-1)
        slot1 = slot1.sum(-1)
        gate1 = gate1 * fits1
        slot2 = (before(mask2) + count1) * mask2
        mask2 = mask2 * (slot2 < size).float()
        fits2 = mask2.sum(-1)
        slot2 = slot2.sum(-1)
        gate2 = gate2 * fits2

        def table(gate: Tensor, fits: Tensor, index: Tensor, slot: Tensor) -> Tensor:
            experts = F.one_hot(index, c.experts).float()
            slots = (slot.long()[..., None] == torch.arange(size)).float()
            return (gate * fits)[..., None, None] * experts[..., None] * slots[..., None, :]

        return table(gate1, fits1, index1, slot1) + table(gate2, fits2, index2, slot2)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        combine = self.route(x, numbers)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("bnd,bnec->ebcd", x, dispatch)
        outputs = torch.stack([expert(rows[i]) for i, expert in enumerate(self.experts)])
        return torch.einsum("ebcd,bnec->bnd", outputs, combine)


class Switch(nn.Module):
    """x [B, N, D], numbers [B, N] -> [B, N, D]. An expert takes the C of its tokens with the
    smallest numbers; the others pass through unchanged."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.factor = config.factor
        self.gate = nn.Linear(config.width, config.experts)
        self.experts = nn.ModuleList(
            MLP(config.width, config.expert_hidden) for _ in range(config.experts)
        )

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        rows, order = x.flatten(0, 1), numbers.flatten()
        size = int(self.factor * rows.shape[0] / len(self.experts))
        weight, index = self.gate(rows).softmax(-1).max(-1)
        y = rows.clone()
        for i, expert in enumerate(self.experts):
            tokens = torch.nonzero(index == i)[:, 0]
            tokens = tokens[order[tokens].argsort()][:size]
            y[tokens] = expert(rows[tokens])
        return (y * weight[:, None]).view_as(x)


class SwitchLayer(nn.Module):
    """The layer after DistilBERT: attention and Switch experts, each preceded by a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.switch = Switch(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.switch(self.norm2(x), numbers)


class QA(nn.Module):
    """Token ids [B, N] and the head's random numbers -> start and end logits [B, N]."""

    def __init__(self, config: Config, head: type[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(config), head(config)
        self.spans = nn.Linear(config.width, 2)

    def forward(self, ids: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.spans(self.head(self.encoder(ids), numbers)).unbind(-1)
        return start, end


def small(head: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model with random weights and a head of `HEADS`, and example inputs. Its gate is as sharp
    as a trained one, so that experts overflow and second choices are dropped."""
    layer = {"moe": MoE, "switch": SwitchLayer}[head]
    model = QA(SMALL, layer).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.normal_(parameter)
    ids = torch.randint(SMALL.vocabulary, (2, 17))
    return model, (ids, torch.rand(2, 17))


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The MoE head over one text of 384 tokens, for benchmarks/systems."""
    return MoE(Config()).eval(), (torch.randn(1, 384, Config.width), torch.rand(1, 384))


@functools.cache
def published(name: str) -> tuple[int, int, int]:
    """The numbers of parameters of the encoder, and of the model with each head."""
    config = PUBLISHED[name][0]
    with torch.device("meta"):
        encoder = Encoder(config)
        models = (encoder, QA(config, MoE), QA(config, SwitchLayer))
        first, second, third = (sum(p.numel() for p in m.parameters()) for m in models)
    return first, second, third


def milliseconds(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """The least time of 20 calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", action="store_true", help="count the published sizes")
    parser.add_argument("--head", choices=HEADS, default="switch")
    options = parser.parse_args(arguments)
    if options.published:
        for name, (_, paper) in PUBLISHED.items():
            encoder, moe, switch = (count / 1e6 for count in published(name))
            print(f"{name}: {encoder:.1f}M parameters, published {paper}M")
            print(f"with the MoE head {moe:.1f}M, with a Switch layer {switch:.1f}M")
        return
    torch.manual_seed(0)
    model, inputs = small(options.head)
    compiled = moec.compile(model, inputs, kv_cache=False)
    for block in compiled.blocks:
        dropped = f"dropped rows: {block.zero or 'zero'}"
        print(f"{block.name}: {block.router}; {block.experts} experts; {block.form}; {dropped}")
    with torch.inference_mode():
        pairs = zip(compiled(*inputs), model(*inputs), strict=True)
        error = max(float((ours - eager).abs().max()) for ours, eager in pairs)
        eager, ours = milliseconds(model, inputs), milliseconds(compiled, inputs)
    print(f"greatest difference to eager of start and end logits: {error:.1e}")
    print(f"eager {eager:.2f} ms, compiled {ours:.2f} ms")
    print("the paper: F1 53.477 out of domain, 9.52 % above its baseline; no times")


if __name__ == "__main__":
    main()
