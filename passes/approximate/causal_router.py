"""One router for all layers of a model: from the tokens' embeddings to the logits of experts.

One causal transformer layer, as in Read-ME (arXiv 2410.19123): RMSNorm, attention, SwiGLU. The
scores of a token depend on the tokens up to it. It is smaller than Read-ME's in two ways: it reads
the model's embeddings instead of its own, and its attention has no positions. It reads no layer of
the model, so one call before the first layer serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from moec.ir.graph import Graph, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.sizes.dims import product, show_dim
from moec.ir.text import parse

HEADS = 4
BATCH = 4
"""The number of sequences in a training step."""
RATE = 3e-3


def causal_router(embedded: Value, width: int, experts: int) -> Graph:
    """embedded [B, S, D] -> logits f32[B*S, experts]; `width` is a multiple of HEADS."""
    batch, length, depth = map(show_dim, embedded.shape)
    tokens = show_dim(product(embedded.shape[:2]))
    each, hidden = width // HEADS, f"f32[{batch}, {length}, {width}]"
    heads = f"f32[{batch}, {length}, {HEADS}, {each}]"
    turned = f"f32[{batch}, {HEADS}, {length}, {each}]"

    def split(x: str) -> str:
        shape = f"({{{batch}}}, {{{length}}}, {HEADS}, {each})"
        return f"""
      s{x}: {hidden} = aten.linear.default(n, w{x})
      h{x}: {heads} = aten.reshape.default(s{x}) <shape={shape}>
      t{x}: {turned} = aten.permute.default(h{x}) <dims=(0, 2, 1, 3)>"""

    square = f"f32[{width}, {width}]"
    return parse(f"""
    graph router(e: {embedded.type}; embed_norm: f32[{depth}], reduce: f32[{width}, {depth}],
        norm: f32[{width}], wq: {square}, wk: {square}, wv: {square}, wo: {square},
        ffn_norm: f32[{width}], w1: {square}, w3: {square}, w2: {square},
        head_norm: f32[{width}], head: f32[{experts}, {width}]) {{
      x: f32[{batch}, {length}, {depth}] = aten._to_copy.default(e) <dtype=f32>
      en: f32[{batch}, {length}, {depth}] = nn.rms_norm(x, embed_norm) <epsilon=1e-06>
      a: {hidden} = aten.linear.default(en, reduce)
      n: {hidden} = nn.rms_norm(a, norm) <epsilon=1e-06>{"".join(map(split, "qkv"))}
      y: {turned} = nn.attention(tq, tk, tv) <scale={each**-0.5!r}, causal=true>
      ty: {heads} = aten.permute.default(y) <dims=(0, 2, 1, 3)>
      sy: {hidden} = aten.reshape.default(ty) <shape=({{{batch}}}, {{{length}}}, {width})>
      o: {hidden} = aten.linear.default(sy, wo)
      r: {hidden} = aten.add.Tensor(a, o)
      fn: {hidden} = nn.rms_norm(r, ffn_norm) <epsilon=1e-06>
      g: {hidden} = aten.linear.default(fn, w1)
      u: {hidden} = aten.linear.default(fn, w3)
      ag: {hidden} = aten.silu.default(g)
      f: {hidden} = aten.mul.Tensor(ag, u)
      d: {hidden} = aten.linear.default(f, w2)
      z: {hidden} = aten.add.Tensor(r, d)
      hn: {hidden} = nn.rms_norm(z, head_norm) <epsilon=1e-06>
      l: f32[{batch}, {length}, {experts}] = aten.linear.default(hn, head)
      logits: f32[{tokens}, {experts}] = aten.reshape.default(l) <shape=({{{tokens}}}, {experts})>
      return logits
    }}""")


def distill(
    graph: Graph,
    embedded: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    steps: int,
    seed: int,
) -> list[torch.Tensor]:
    """Weights for `graph.params` by which a router's softmax follows the targets.

    `embedded` are sequences f32[B, S, D], `targets` f32[B*S, E] their distributions over experts;
    the loss is KL(target || router), averaged over tokens.
    """
    batch = graph.inputs[0].shape[0]
    most = batch if isinstance(batch, int) else BATCH
    generator = torch.Generator().manual_seed(seed)
    params = [
        torch.ones([int(d) for d in p.shape])
        if len(p.shape) == 1
        else torch.randn([int(d) for d in p.shape], generator=generator) * int(p.shape[1]) ** -0.5
        for p in graph.params
    ]
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in params], lr=RATE)
    pairs = [
        (part, distribution)
        for e, t in zip(embedded, targets, strict=True)
        for part, distribution in zip(
            torch.split(e, most), torch.split(t, most * e.shape[1]), strict=True
        )
    ]
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            index = int(torch.randint(len(pairs), (), generator=generator))
            e, target = pairs[index]
            logits = run_graph(graph, [e, *params])[0]
            loss = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return [p.detach() for p in params]
