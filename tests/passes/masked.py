"""A model whose routers have masked columns: the expected result of pruning."""

from __future__ import annotations

import torch

from moec.ir.graph import Program
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import PassResult
from tests.passes.changed import (
    LAYER,
    graph,
)


def with_masks(original: Program, experts: list[list[int]], layer: str = LAYER) -> Program:
    """The same model with minus infinity added to the router's columns that are not kept."""
    text = print_graph(graph(len(experts), layer))
    weights = dict(original.weights)
    for i, entry in enumerate(experts):
        mask = torch.full((4,), -torch.inf)
        mask[entry] = 0
        weights[f"mask{i}"] = mask
        text = text.replace("embed: f32[20, 8]", f"embed: f32[20, 8], mask{i}: f32[4]", 1)
        text = text.replace(
            f"  w{i}:", f"  m{i}: f32[B*S, 4] = aten.add.Tensor(logits{i}, mask{i})\n  w{i}:", 1
        ).replace(f"moe.route(logits{i}", f"moe.route(m{i}")
        if f"(m{i}, c{i})" in text:
            more = f"  d{i}: f32[4] = aten.add.Tensor(c{i}, mask{i})\n  m{i}:"
            text = text.replace(f"(m{i}, c{i})", f"(m{i}, d{i})").replace(f"  m{i}:", more)
    return Program(parse(text), weights)


def kept_by(step: PassResult) -> list[list[int]]:
    """Which of four experts each layer kept."""
    says = [line.says for line in step.damage.layers]
    return [
        list(map(int, s.removeprefix("keeps ").removesuffix(" of 4").split(", "))) for s in says
    ]
