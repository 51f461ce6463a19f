"""Small dense models as text, their domains of tokens, and refactor-dense run on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moec.ir.graph import Program, Stage, Value
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse
from moec.passes.approximate.refactor_dense import RefactorDense
from moec.passes.calibration.budget import parse_budget
from moec.passes.calibration.session import CalibrationSession, MeasuredPass
from moec.passes.core.runner import PassResult, run

GATED = """
  g#: f32[B, S, 12] = aten.linear.default(IN, layers.#.w1) @ layers.#.w1
  u#: f32[B, S, 12] = aten.linear.default(IN, layers.#.w3) @ layers.#.w3
  a#: f32[B, S, 12] = aten.silu.default(g#)
  h#: f32[B, S, 12] = aten.mul.Tensor(a#, u#)
  y#: f32[B, S, 8] = aten.linear.default(h#, layers.#.w2) @ layers.#.w2
  x#: f32[B, S, 8] = aten.add.Tensor(IN, y#)
"""
BIASED = (
    GATED.replace("layers.#.w1) @", "layers.#.w1, layers.#.b1) @")
    .replace("layers.#.w2) @", "layers.#.w2, layers.#.b2) @")
    .replace("aten.mul.Tensor(a#, u#)", "aten.mul.Tensor(a#, a#)")
    .replace("  u#: f32[B, S, 12] = aten.linear.default(IN, layers.#.w3) @ layers.#.w3\n", "")
)
FLAT = "\n  f#: f32[B*S, 8] = aten.reshape.default(IN) <shape=({B*S}, 8)>" + GATED.replace(
    "(IN, layers", "(f#, layers"
).replace("f32[B, S, 12]", "f32[B*S, 12]").replace("y#: f32[B, S, 8]", "y#: f32[B*S, 8]").replace(
    "  x#:", "  r#: f32[B, S, 8] = aten.reshape.default(y#) <shape=({B}, {S}, 8)>\n  x#:"
).replace("(IN, y#)", "(IN, r#)")


def program(layers: int = 2, layer: str = GATED) -> Program:
    params = ["embed: f32[20, 8]", "one: f32[1, 8]"]
    for i in range(layers):
        shapes = {"w1": "12, 8", "w3": "12, 8", "w2": "8, 12", "b1": "12", "b2": "8"}
        params += [f"layers.{i}.{name}: f32[{shape}]" for name, shape in shapes.items()]
    body = "".join(
        layer.replace("#", str(i)).replace("IN", "h" if i == 0 else f"x{i - 1}")
        for i in range(layers)
    )
    graph = parse(f"""
    graph main(ids: i64[B, S]; {", ".join(params)}) {{
      size B in [1, inf]
      size S in [1, 64]
      h: f32[B, S, 8] = aten.embedding.default(embed, ids){body}
      scores: f32[B, S, 20] = aten.linear.default(x{layers - 1}, embed) @ head
      return scores
    }}""")
    generator = torch.Generator().manual_seed(1)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 2
        for p in graph.params
    }
    # Tokens of the two domains are far apart.
    weights["embed"][:, 0] = torch.tensor([2.0, -2.0]).repeat_interleave(10)
    return Program(graph, weights)


def tokens(low: int, high: int, count: int = 256) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(low)
    return {"ids": torch.randint(low, high, (count // 16, 16), generator=generator)}


DOMAINS = {"low": tokens(0, 10), "high": tokens(10, 20)}
SMALL = RefactorDense(width=4, steps=20)


def change(
    program: Program, pass_: RefactorDense = SMALL, limit: str = "", calib: Any = DOMAINS
) -> PassResult:
    session = CalibrationSession(calib, {}, parse_budget(limit))
    return run(program, [MeasuredPass(pass_, session)], stage=Stage.MOE)[-1]


def everything() -> Tensor:
    return torch.cat([data["ids"] for data in DOMAINS.values()])


def values(program: Program, value: Value, ids: Tensor) -> Tensor:
    graph = replace(program.graph, outputs=(value,))
    return evaluate(graph, [ids], program.weights)[0]


def choices(program: Program, ids: Tensor) -> Tensor:
    """Which expert each token is sent to: i64[T]."""
    (route,) = [op for op in program.graph.ops if op.name == "moe.route"]
    return values(program, route.outputs[1], ids)[:, 0]


def hidden(program: Program) -> Tensor:
    """The channels of the only layer: [32, 16, 12]."""
    (down,) = [op for op in program.graph.ops if ".w2" in op.origin]
    return values(program, down.inputs[0], everything()).reshape(32, 16, 12)
