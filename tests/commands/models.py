"""A small model as text and as a report, for the output of the command line."""

from __future__ import annotations

import torch

from moec.ir.graph import Graph
from moec.ir.text import parse
from moec.report.data import Block, DeclinedLine, ErrorLine, PassLine
from moec.report.report import Report, describe_graph

LAYER = """
  n#: f32[T, 8] = aten.mul.Tensor(IN, layers.#.norm.weight) @ layers.#.norm
  a#: f32[T, 8] = aten.linear.default(n#, layers.#.attn.weight) @ layers.#.attn
  r#: f32[T, 8] = aten.add.Tensor(IN, a#) @ layers.#
  g#: f32[T, 4] = aten.linear.default(r#, layers.#.moe.router.weight) @ layers.#.moe.router
  w#: f32[T, 2], e#: i64[T, 2] = moe.route(g#) <k=2> @ layers.#.moe
  d#: f32[2*T, 8], o#: i32[2*T], s#: i32[4] = moe.dispatch(r#, e#) <num_experts=4> @ layers.#.moe
  m#: f32[2*T, 8] = moe.experts(d#, s#, layers.#.moe.up) @ layers.#.moe {
    graph body(x: f32[R, 8]; up: f32[8, 8]) {
      y: f32[R, 8] = aten.linear.default(x, up)
      return y
    }
  }
  c#: f32[T, 8] = moe.combine(m#, o#, w#)
    <k=2, tokens={T}, dtype=f32, weighted=true> @ layers.#.moe
  x#: f32[T, 8] = aten.add.Tensor(r#, c#) @ layers.#
"""


def layer(i: int, x: str) -> str:
    """A norm, a linear "attention" and an MoE block, each with its residual."""
    return LAYER.replace("#", str(i)).replace("IN", x)


def graph(layers: int = 3) -> Graph:
    params = ["embed.weight: f32[50, 8]"]
    for i in range(layers):
        at = f"layers.{i}"
        params += [
            f"{at}.norm.weight: f32[8]",
            f"{at}.attn.weight: f32[8, 8]",
            f"{at}.moe.router.weight: f32[4, 8]",
            f"{at}.moe.up: f32[4, 8, 8]",
        ]
    params.append("head.weight: f32[50, 8]")
    body = "".join(layer(i, "h" if i == 0 else f"x{i - 1}") for i in range(layers))
    return parse(f"""
    graph main(ids: i64[T]; {", ".join(params)}) {{
      size T in [1, 512]
      h: f32[T, 8] = aten.embedding.default(embed.weight, ids) @ embed{body}
      logits: f32[T, 50] = aten.linear.default(x{layers - 1}, head.weight) @ head
      return logits
    }}
    """)


def weights(of: Graph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 3 for p in of.params
    }


def block(i: int, experts: int = 4) -> Block:
    return Block(
        f"layers.{i}.moe", experts, 2, "softmax, top-2", "linear", "loop", 288, 160, "", "grouped"
    )


def report(layers: int = 3) -> Report:
    recognised = graph(layers)
    return Report(
        model="tiny",
        target="avx512",
        active_parameters=1400,
        bytes_out=5000,
        text="the cache takes 1.0 kB a token; texts run side by side",
        blocks=tuple(block(i) for i in range(layers)),
        declined=(
            DeclinedLine("layers.1.attn", "a linear layer is no expert", "recognise"),
            DeclinedLine("layers.2.attn", "a linear layer is no expert", "recognise"),
        ),
        passes=(
            PassLine("capture", "ATEN", 0, 29, 0.0),
            PassLine("recognise", "MOE", 3, 29, 0.25),
        ),
        kernels={"grouped": 3},
        verification=(ErrorLine("logits", 1.5e-7, 1e-4), ErrorLine("hidden", 2e-3, 1e-4)),
        phases={"capture": 1.25, "kernels": 61.0},
        notes=("axis 1 of ids is always 7",),
        **describe_graph(recognised, weights(recognised)),
    )
