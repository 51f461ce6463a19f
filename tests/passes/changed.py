"""A small language model of two MoE layers as a graph, for approximate passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.ir.graph import Graph, Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse
from moec.passes.calibration.budget import parse_budget
from moec.passes.calibration.session import Approximate, CalibrationSession, MeasuredPass
from moec.passes.core.moe_layer import Layer, layer_of
from moec.passes.core.runner import PassResult, run

EXPERTS, VOCABULARY = 4, 20

LAYER = """
  logits#: f32[B*S, 4] = aten.linear.default(IN, layers.#.router) @ layers.#.router
  w#: f32[B*S, 2], i#: i64[B*S, 2] = moe.route(logits#) <k=2, renormalize=true> @ layers.#.router
  rows#: f32[2*B*S, 8], order#: i32[2*B*S], ends#: i32[4] =
    moe.dispatch(IN, i#) <num_experts=4> @ layers.#
  out#: f32[2*B*S, 8] = moe.experts(rows#, ends#, layers.#.w1, layers.#.w3, layers.#.w2)
    @ layers.#.experts {
    graph body(bx: f32[R, 8]; b1: f32[6, 8], b3: f32[6, 8], b2: f32[8, 6]) {
      g: f32[R, 6] = aten.linear.default(bx, b1)
      u: f32[R, 6] = aten.linear.default(bx, b3)
      a: f32[R, 6] = aten.silu.default(g)
      h: f32[R, 6] = aten.mul.Tensor(a, u)
      y: f32[R, 8] = aten.linear.default(h, b2)
      return y
    }
  }
  y#: f32[B*S, 8] = moe.combine(out#, order#, w#)
    <k=2, tokens={B*S}, dtype=f32, weighted=true> @ layers.#
  x#: f32[B*S, 8] = aten.add.Tensor(IN, y#)
"""
LIMITED = LAYER.replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, j#)").replace(
    "  rows#:", "  j#: i64[B*S, 2] = moe.capacity(i#) <num_experts=4, capacity=3>\n  rows#:"
)
SCALED = LAYER.replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, i#, w#)")


def graph(layers: int = 2, layer: str = LAYER) -> Graph:
    params = ["embed: f32[20, 8]"]
    for i in range(layers):
        shapes = {"router": "4, 8", "w1": "4, 6, 8", "w3": "4, 6, 8", "w2": "4, 8, 6"}
        params += [f"layers.{i}.{name}: f32[{shape}]" for name, shape in shapes.items()]
    body = "".join(
        layer.replace("#", str(i)).replace("IN", "h" if i == 0 else f"x{i - 1}")
        for i in range(layers)
    )
    return parse(f"""
    graph main(ids: i64[B, S]; {", ".join(params)}) {{
      size B in [1, inf]
      size S in [1, 64]
      embedded: f32[B, S, 8] = aten.embedding.default(embed, ids)
      h: f32[B*S, 8] = aten.reshape.default(embedded) <shape=({{B*S}}, 8)>{body}
      flat: f32[B*S, 20] = aten.linear.default(x{layers - 1}, embed) @ head
      scores: f32[B, S, 20] = aten.reshape.default(flat) <shape=({{B}}, {{S}}, 20)>
      return scores
    }}""")


def program(layers: int = 2, layer: str = LAYER) -> Program:
    result = graph(layers, layer)
    generator = torch.Generator().manual_seed(1)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) / 2
        for p in result.params
    }
    return Program(result, weights)


def tokens(count: int = 256, seed: int = 0, limit: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limit, (count // 16, 16), generator=generator)


def change(
    program: Program, *passes: Approximate, limit: str = "", strict: bool = False, calib: Any = None
) -> list[PassResult]:
    """The result of passes on a program, with 256 tokens of data unless `calib` is set."""
    session = CalibrationSession(
        {"ids": tokens()} if calib is None else calib, {}, parse_budget(limit), strict
    )
    return run(program, [MeasuredPass(p, session) for p in passes], stage=Stage.MOE)


def declined(program: Program, pass_: Approximate) -> str:
    """Why a pass leaves a program alone, as it must for this to be asked."""
    step = change(program, pass_)[-1]
    assert step.program is program
    assert step.damage is not None
    assert not step.damage.applied
    return "; ".join(d.reason for d in step.declined)


def layers_of(program: Program) -> list[Layer]:
    ops = program.graph.ops
    return [layer_of(program.graph, op) for op in ops if op.name == "moe.experts"]


def outputs(program: Program, ids: torch.Tensor) -> Sequence[torch.Tensor]:
    return evaluate(program.graph, [ids], program.weights)
