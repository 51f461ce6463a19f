"""Routing parity: the share of tokens that chose the same experts in the file as in eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moec.codegen.onnx.lower import OnnxGraph, block_of
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Program
from moec.ops.experts.dispatch import SORTS

Run = Callable[[Mapping[str, Any]], Mapping[str, torch.Tensor]]


def routing_parity(
    lowered: OnnxGraph, program: Program, run: Run, cases: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """The parity by block, over all tokens of all cases. `run` returns the ids of experts by the
    names in `lowered.choices`; they are compared with the graph in eager PyTorch. The order among a
    token's experts is ignored."""
    graph = program.graph
    ids = tuple(dict.fromkeys(value for value, _ in lowered.choices))
    names = dict(lowered.choices)
    traced = replace(graph, outputs=ids, states=())
    same = dict.fromkeys(ids, 0)
    tokens = dict.fromkeys(ids, 0)
    for case in cases:
        feeds = {v.name: tensor for v, tensor in zip(graph.inputs, case, strict=True)}
        choices = run(feeds)
        for value, expected in zip(ids, evaluate(traced, case, program.weights), strict=True):
            actual = choices[names[value]]
            equal = (actual.sort(-1).values == expected.sort(-1).values).all(-1)
            same[value] += int(equal.sum())
            tokens[value] += equal.numel()
    shares: dict[str, float] = {}
    for value in ids:
        sort = next(op for op in graph.readers[value] if op.name in SORTS)
        block = block_of(graph, sort)
        share = same[value] / tokens[value] if tokens[value] else 1.0
        shares[block] = min(share, shares.get(block, 1.0))
    return shares
