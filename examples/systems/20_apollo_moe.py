"""ApolloMoE (arXiv 2410.10626): a multilingual medical language model, upcycled in its last layers.

A dense decoder (Qwen2's form) becomes sparse in its last two layers only, "Post-MoE": each of 12
experts starts as a copy of the dense feed-forward layer. A token uses the two experts of greatest
softmax probability, which are not renormalised. Each language family has an expert. In training,
hybrid routing replaces a token's second choice by the expert of its language if that is not among
the two. At inference, only the router chooses.

The languages of the small run are three kinds of text of Python's standard library, as bytes:
source code, docstrings, and names of characters.

    python examples/systems/20_apollo_moe.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    key_heads: int
    hidden: int
    words: int
    tied: bool = True
    experts: int = 12
    sparse: int = 2  # the number of last layers that have experts

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SMALL = Size(layers=3, width=32, heads=4, key_heads=2, hidden=64, words=256, experts=4)
PUBLISHED = {
    "0.5B": Size(24, 896, 14, 2, 4864, 151_936),
    "1.5B": Size(28, 1536, 12, 2, 8960, 151_936),
    "7B": Size(28, 3584, 28, 4, 18_944, 152_064, tied=False),
}


class FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Experts(nn.Module):
    """x [B, S, D], languages [B, S] or None -> [B, S, D]; `languages` has the expert that each
    token is forced to use."""

    def __init__(self, dense: FeedForward, size: Size) -> None:
        super().__init__()
        self.router = nn.Linear(size.width, size.experts, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(size.experts))

    def forward(self, x: Tensor, languages: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows).softmax(dim=-1)
        weights, chosen = scores.topk(2, dim=-1)
        if languages is not None:
            expert = languages.reshape(-1, 1)
            missing = (chosen != expert).all(dim=-1, keepdim=True)
            last = torch.where(missing, expert, chosen[:, 1:])
            chosen = torch.cat([chosen[:, :1], last], dim=-1)
            weights = scores.gather(-1, chosen)
        y = torch.zeros_like(rows)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for number, expert_module in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            y.index_add_(0, token, expert_module(rows[token]) * weights[token, slot, None])
        return y.reshape(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.query = nn.Linear(size.width, size.heads * size.head_width)
        self.key, self.value = (
            nn.Linear(size.width, size.key_heads * size.head_width) for _ in range(2)
        )
        self.out = nn.Linear(size.heads * size.head_width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            linear(x).view(b, s, -1, self.size.head_width).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(size.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(size)
        self.mlp: FeedForward | Experts = FeedForward(size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, languages: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        if isinstance(self.mlp, Experts):
            return x + self.mlp(self.norm2(x), languages)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """input_ids [B, S], language_ids [B, S] or None -> logits [B, S, words]. Dense until
    upcycled."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.words, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.words, bias=False)
        if size.tied:
            self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=size.width**-0.5)

    def forward(self, input_ids: Tensor, language_ids: Tensor | None = None) -> Tensor:
        x, width = self.embed(input_ids), self.size.head_width
        turns = 1_000_000 ** -(torch.arange(0, width, 2) / width)
        angles = torch.arange(input_ids.shape[1])[:, None] * torch.cat([turns, turns])
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, language_ids)
        y: Tensor = self.head(self.norm(x))
        return y


def upcycle(dense: Decoder) -> Decoder:
    """Post-MoE: the model whose last layers have copies of their dense layer as experts."""
    model = copy.deepcopy(dense)
    for layer in model.layers[-model.size.sparse :]:
        layer.mlp = Experts(layer.mlp, model.size)
    return model


def corpus(length: int) -> tuple[Tensor, Tensor]:
    """Windows [N, length] of bytes of three kinds of text, and the kind of each [N]."""
    import inspect
    import json
    import unicodedata
    from string import printable

    source = inspect.getsource(json.decoder)
    text = "\n".join(str(inspect.getdoc(value)) for value in vars(str).values() if callable(value))
    names = "\n".join(unicodedata.name(chr(code), printable) for code in range(0x370, 0x700))
    windows, kinds = [], []
    for kind, words in enumerate((source, text, names)):
        ids = torch.tensor(list(words.encode("ascii", "replace")))
        windows.append(ids[: len(ids) // length * length].view(-1, length))
        kinds.append(torch.full((len(windows[-1]),), kind))
    return torch.cat(windows), torch.cat(kinds)


def train(model: Decoder, steps: int, hybrid: bool, length: int = 32) -> list[float]:
    """Trains on the next bytes of the corpus, with hybrid routing or only the router. Returns the
    losses."""
    windows, kinds = corpus(length)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(windows), (16,))
        languages = kinds[batch, None].expand(-1, length) if hybrid else None
        logits = model(windows[batch], languages)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[batch][:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def share_of_own_expert(model: Decoder, length: int = 32) -> float:
    """The share of tokens of the corpus that use the expert of their language at inference."""
    windows, kinds = corpus(length)
    choices: list[Tensor] = []

    def record(router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        choices.append(logits.topk(2, dim=-1).indices.view(-1, length, 2))

    hooks = [
        m.router.register_forward_hook(record) for m in model.modules() if isinstance(m, Experts)
    ]
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    hits = [(choice == kinds[:, None, None]).any(dim=-1) for choice in choices]
    return float(torch.stack(hits).float().mean())


def parameters(size: Size) -> tuple[int, int]:
    """The numbers of all parameters of the upcycled model, and of those that one token uses;
    nothing is allocated."""
    with torch.device("meta"):
        dense = Decoder(size)
    total = sum(p.numel() for p in dense.parameters())
    expert = 3 * size.width * size.hidden
    router = size.width * size.experts
    more = size.sparse * router + total
    return more + size.sparse * (size.experts - 1) * expert, more + size.sparse * expert


def serve(model: Decoder, forced: bool = False) -> moec.CompiledModel:
    """The artifact for inference, or one with the forced experts as an input."""
    inputs = (torch.randint(256, (2, 7)), torch.randint(4, (2, 7)))[: 1 + forced]
    axes = {0: torch.export.Dim("B"), 1: torch.export.Dim("S")}
    shapes = (axes,) * len(inputs)
    return moec.compile(model, inputs, dynamic_shapes=shapes, kv_cache=not forced)


def layer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of a layer of the 0.5B model, for inference."""
    size = PUBLISHED["0.5B"]
    return Experts(FeedForward(size), size).eval(), (torch.randn(2, 128, size.width),)


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    print("published bases, upcycled with 12 experts in 2 layers")
    for name, size in PUBLISHED.items():
        total, active = (count / 1e9 for count in parameters(size))
        print(f"{name:6}{total:6.2f} billion parameters, {active:5.2f} billion active for a token")

    torch.manual_seed(0)
    dense = Decoder(SMALL)
    losses = train(dense, steps=60, hybrid=False)
    model = upcycle(dense)
    before = share_of_own_expert(model)
    more = train(model, steps=60, hybrid=True)
    after = share_of_own_expert(model)
    print(f"\ndense: loss {losses[0]:.2f}, then {losses[-1]:.2f}; with experts {more[-1]:.2f}")
    print(f"tokens that take their language's expert unforced: {before:.0%}, then {after:.0%}")

    ids, languages = torch.randint(256, (2, 7)), torch.randint(4, (2, 7))
    served, forced = serve(model), serve(model, forced=True)
    for name, compiled in (("inference", served), ("forced", forced)):
        inputs = ", ".join(port.name for port in compiled.package.main.inputs)
        print(f"\n{name}: inputs {inputs}")
        for block in compiled.blocks:
            print(f"  {block.name}: top {block.top_k} of {block.experts} experts, {block.router}")
    with torch.no_grad():
        for arguments, compiled in (((ids,), served), ((ids, languages), forced)):
            torch.testing.assert_close(
                compiled(*arguments), model(*arguments), rtol=1e-4, atol=1e-4
            )
    (text,) = served.generate([list(b"def ")], max_new_tokens=24)
    print(f"\nboth equal eager; it writes {bytes(map(int, text)).decode('ascii', 'replace')!r}")


if __name__ == "__main__":
    main()
