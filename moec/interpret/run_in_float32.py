"""A program in float32, whatever its dtypes: what it means, without what it rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from moec.interpret.evaluate import evaluate
from moec.ir.graph import Program
from moec.ir.upcast import widen

MEANING = 2e-4
"""Two graphs in float32 that mean the same differ by less, as a share of the greatest value."""

Tensors = Sequence[torch.Tensor]


def in_float32(program: Program) -> Callable[[Tensors], tuple[torch.Tensor, ...]]:
    """The program in eager PyTorch with every bf16 and f16 widened to float32: from inputs
    (states' contents last) to outputs and the states' new contents. Weights are widened once."""
    graph = widen(replace(program.graph, outputs=program.graph.results, states=()))
    weights = {param.name: _wide(program.weights[param.name]) for param in graph.params}

    def run(inputs: Tensors) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return evaluate(graph, [_wide(tensor) for tensor in inputs], weights)

    return run


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    low = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if low else tensor
