"""Read-ME (arXiv 2410.19123): a dense language model becomes experts with one router before them.

The channels of each feed-forward layer that a domain of text uses most become the expert of that
domain; channels that all domains use are part of every expert. One small transformer reads only
token ids and chooses one expert per token for all layers at once, before the first layer runs. So a
server knows the experts of every request in its queue. It can prefetch experts, evict the one whose
next use is farthest (Belady), and batch requests that share an expert.

    python examples/systems/23_read_me.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    hidden: int
    words: int
    domains: int = 7
    remain: float = 0.5  # share of the channels in an expert
    router_width: int = 512
    router_heads: int = 4


SMALL = Size(
    layers=2, width=32, heads=4, hidden=64, words=256, domains=5, router_width=16, router_heads=2
)
LLAMA_2_7B = Size(layers=32, width=4096, heads=32, hidden=11_008, words=32_000)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """x [B, S, D] -> [B, S, D]: causal, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        head = width // self.heads
        turns = 10_000 ** -(torch.arange(0, head, 2) / head)
        angles = torch.arange(s)[:, None] * torch.cat([turns, turns])
        q, k, v = (
            linear(x).view(b, s, self.heads, head).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = (rotate(each, angles.cos(), angles.sin()) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, width))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def channels(self, x: Tensor) -> Tensor:
        """The input of the down-projection."""
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.channels(x))
        return y


class Router(nn.Module):
    """input_ids [B, S] -> logits [B, S, experts]: a separate transformer of one layer."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.router_width
        self.embed = nn.Embedding(size.words, width)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(width) for _ in range(3))
        self.attention = Attention(width, size.router_heads)
        self.mlp = FeedForward(width, width)
        self.head = nn.Linear(width, size.domains, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        y: Tensor = self.head(self.norm3(x))
        return y


class Experts(nn.Module):
    """x [B, S, D], expert [B, S] -> [B, S, D]: each token uses its one expert."""

    def __init__(self, experts: list[FeedForward]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        rows, numbers = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
        y = torch.zeros_like(rows)
        for number, module in enumerate(self.experts):
            (token,) = torch.where(numbers == number)
            y.index_add_(0, token, module(rows[token]))
        return y.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.attention = Attention(size.width, size.heads)
        self.mlp: FeedForward | Experts = FeedForward(size.width, size.hidden)

    def forward(self, x: Tensor, expert: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + (
            self.mlp(self.norm2(x), expert) if expert is not None else self.mlp(self.norm2(x))
        )


class ReadMe(nn.Module):
    """input_ids [B, S] -> logits [B, S, words]. Dense and without a router until refactored."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.router: Router | None = None
        self.embed = nn.Embedding(size.words, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, size.words, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        expert = None if self.router is None else self.router(input_ids).argmax(dim=-1)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, expert)
        y: Tensor = self.head(self.norm(x))
        return y


def corpus(size: Size, length: int) -> tuple[Tensor, Tensor]:
    """Windows [N, length] of bytes of Python's standard library, and their domains [N]: source
    code, docstrings, names of characters, numbers, and error messages."""
    import inspect
    import json
    import math
    import os
    import unicodedata

    source = inspect.getsource(json.decoder)
    text = "\n".join(str(inspect.getdoc(value)) for value in vars(str).values() if callable(value))
    names = "\n".join(unicodedata.name(chr(code), "") for code in range(0x370, 0x700))
    logarithms = "\n".join(str(math.log(number)) for number in range(1, 300))
    messages = "\n".join(os.strerror(number) for number in range(1, 134))
    windows, domains = [], []
    for domain, words in enumerate((source, text, names, logarithms, messages)):
        ids = torch.tensor(list(words.encode("ascii", "replace")))
        windows.append(ids[: len(ids) // length * length].view(-1, length))
        domains.append(torch.full((len(windows[-1]),), domain))
    return torch.cat(windows), torch.cat(domains)


def next_token_loss(model: ReadMe, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module, loss: Callable[[Tensor], Tensor], steps: int, rate: float
) -> list[float]:
    """Trains by AdamW on random batches; `loss` takes indices of windows. Returns the losses."""
    adam = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        value = loss(torch.rand(16))
        adam.zero_grad()
        value.backward()
        adam.step()
        losses.append(value.item())
    return losses


def masks(model: ReadMe, windows: Tensor, domains: Tensor) -> list[Tensor]:
    """For each layer, the channels that each domain keeps: bool [domains, H]. They have the
    greatest mean activation at the input of the down-projection."""
    size = model.size
    channels = round(size.remain * size.hidden)
    means: list[list[Tensor]] = [[] for _ in model.layers]
    for domain in range(size.domains):
        hooks = [
            layer.mlp.down.register_forward_pre_hook(
                lambda _, inputs, into=into: into.append(inputs[0].abs().mean(dim=(0, 1)))
            )
            for layer, into in zip(model.layers, means, strict=True)
        ]
        with torch.no_grad():
            model(windows[domains == domain])
        for hook in hooks:
            hook.remove()
    channel_masks = []
    for activations in means:
        chosen = torch.stack(activations).topk(channels, dim=-1).indices
        channel_masks.append(
            torch.zeros(size.domains, size.hidden, dtype=torch.bool).scatter_(1, chosen, True)
        )
    return channel_masks


def expert(dense: FeedForward, channels: Tensor) -> FeedForward:
    """The dense layer reduced to some channels: rows of gate and up, columns of down. Channels that
    every domain keeps are in every expert, so the permanent expert and the domain's are one
    layer."""
    width = dense.down.out_features
    module = FeedForward(width, int(channels.sum()))
    with torch.no_grad():
        module.gate.weight.copy_(dense.gate.weight[channels])
        module.up.weight.copy_(dense.up.weight[channels])
        module.down.weight.copy_(dense.down.weight[:, channels])
    return module


def refactor(dense: ReadMe, channel_masks: Sequence[Tensor]) -> ReadMe:
    """The dense model with experts in place of its feed-forward layers, and a random router."""
    model = copy.deepcopy(dense)
    model.router = Router(dense.size)
    for layer, channels in zip(model.layers, channel_masks, strict=True):
        layer.mlp = Experts([expert(layer.mlp, mask) for mask in channels])
    return model


def router_targets(channel_masks: Sequence[Tensor], domains: Tensor) -> Tensor:
    """The softmax of the overlap of each expert's masks with those of a domain: [N, experts]."""
    every = torch.cat([mask.float() for mask in channel_masks], dim=1)
    overlap = every @ every.T / every.sum(dim=1)
    return (10 * overlap).softmax(dim=-1)[domains]


def router_loss(model: ReadMe, windows: Tensor, targets: Tensor) -> Tensor:
    """The KL divergence of the router's distribution at each token from its text's targets [N,
    experts]."""
    assert model.router is not None
    logits = model.router(windows).log_softmax(dim=-1)
    return F.kl_div(logits, targets[:, None].expand_as(logits), reduction="none").sum(-1).mean()


def build(size: Size, steps: int) -> tuple[ReadMe, ReadMe, list[float]]:
    """A dense model and its refactored model, both trained briefly, and the router's losses."""
    windows, domains = corpus(size, 32)

    def some(share: Tensor) -> Tensor:
        return (share * len(windows)).long()

    dense = ReadMe(size)
    train(dense, lambda share: next_token_loss(dense, windows[some(share)]), steps, 3e-3)
    channel_masks = masks(dense, windows, domains)
    model = refactor(dense, channel_masks)
    targets = router_targets(channel_masks, domains)
    router = model.router
    assert router is not None
    losses = train(
        router,
        lambda share: router_loss(model, windows[some(share)], targets[some(share)]),
        steps,
        3e-3,
    )
    train(model.layers, lambda share: next_token_loss(model, windows[some(share)]), steps, 1e-3)
    return dense, model, losses


def serve(model: ReadMe, ids: Tensor) -> moec.CompiledModel:
    """The artifact with its router as a separate function."""
    axes = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
    return moec.compile(
        model, (ids,), dynamic_shapes=(axes,), passes="+hoist-routers", kv_cache=False
    )


def parameters(size: Size) -> tuple[int, int, int]:
    """The numbers of parameters of the router, of all, and of those that one token uses, if the
    experts of all domains together have `domains * remain` times the channels; nothing is
    allocated."""
    with torch.device("meta"):
        router, dense = Router(size), ReadMe(size)
    total = sum(p.numel() for p in dense.parameters())
    feed_forward = sum(p.numel() for layer in dense.layers for p in layer.mlp.parameters())
    router_size = sum(p.numel() for p in router.parameters())
    part = round(feed_forward * size.remain)
    rest = total - feed_forward + router_size
    return router_size, rest + size.domains * part, rest + part


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of one layer of the published model over 32 tokens, with the choices as an input,
    for benchmarks/systems."""
    size = LLAMA_2_7B
    hidden = int(size.remain * size.hidden)
    experts = [FeedForward(size.width, hidden) for _ in range(size.domains)]
    inputs = (torch.randn(1, 32, size.width), torch.randint(size.domains, (1, 32)))
    return Experts(experts).eval(), inputs


def cache_hits(trace: Sequence[int], size: int, policy: str) -> int:
    """The uses in a trace that hit a cache of `size` experts, which is empty at first."""
    later: dict[int, int] = {}
    following = [len(trace)] * len(trace)
    for time, expert in reversed([*enumerate(trace)]):
        following[time], later[expert] = later.get(expert, len(trace)), time
    generator, hits = Random(0), 0
    cached: dict[int, float] = {}  # by expert: its rank in the policy; the least is evicted
    for time, expert in enumerate(trace):
        hits += expert in cached
        if expert not in cached and len(cached) == size:
            del cached[min(cached, key=cached.__getitem__)]
        ranks = {"belady": -following[time], "lru": time, "random": generator.random()}
        cached[expert] = ranks[policy]
    return hits


def batches_by_expert(trace: Sequence[int], budget: int) -> list[list[int]]:
    """The indices of a trace in batches of `budget`, those of the most frequent experts first."""
    ordered = sorted(
        range(len(trace)), key=lambda index: (-trace.count(trace[index]), trace[index])
    )
    return [ordered[start : start + budget] for start in range(0, len(trace), budget)]


def experts_per_batch(trace: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    return sum(len({trace[index] for index in batch}) for batch in batches) / len(batches)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    router_size, total, active = parameters(LLAMA_2_7B)
    print("Llama-2-7B in 7 experts, without what they share (paper)")
    print(f"router {router_size / 1e6:.1f} M (18 M), active {active / 1e9:.2f} B (4.7 B)")
    print(f"all {total / 1e9:.1f} B (17 B)")

    torch.manual_seed(0)
    dense, model, losses = build(SMALL, steps=60)
    windows, _ = corpus(SMALL, 32)
    with torch.no_grad():
        before, after = (float(next_token_loss(m, windows)) for m in (dense, model))
    print(f"\nloss: dense {before:.2f}, experts of half its channels {after:.2f}")
    print(f"router: {losses[0]:.2f}, then {losses[-1]:.2f}")

    served = serve(model, windows[:2, :7])
    for line in served.report().notes:
        print(line)
    requests = windows[torch.randperm(len(windows))[:64]]
    choices = served.routers(requests)
    layers = list(choices)
    same = all(
        torch.equal(choices[layers[0]]["experts"], choices[name]["experts"]) for name in layers
    )
    print(f"experts of {len(requests)} requests, known ahead; the same in all layers: {same}")

    trace = choices[layers[0]]["experts"].view(len(requests), -1)[:, -1].tolist()
    uses = choices[layers[0]]["experts"].view(len(requests), -1).T.flatten().tolist()
    for size in range(1, SMALL.domains + 1):
        rates = [
            100 * cache_hits(uses, size, policy) / len(uses)
            for policy in ("random", "lru", "belady")
        ]
        print("cache of {}: random {:.1f} %, LRU {:.1f} %, Belady {:.1f} %".format(size, *rates))
    fifo = experts_per_batch(trace, [range(i, i + 8) for i in range(0, len(trace), 8)])
    grouped = experts_per_batch(trace, batches_by_expert(trace, 8))
    print(f"experts in a batch of 8 requests: {fifo:.2f} as they come, {grouped:.2f} by expert")

    logits = torch.zeros(len(requests), requests.shape[1], SMALL.words)
    for batch in batches_by_expert(trace, 8):
        logits[batch] = served.routed(served.routers(requests[batch]), requests[batch])
    with torch.no_grad():
        error = float((logits - model(requests)).abs().max())
    print(f"greatest difference of these batches to eager: {error:.0e}")


if __name__ == "__main__":
    main()
