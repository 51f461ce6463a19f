"""Trains the grids of compressed weights together, on the outputs of the whole model.

    w = moe.decompress(stream, starts, grid)  ->  w = moe.decompress(stream, starts, grid')

Runs after compress-experts, which fits each matrix separately and ignores the errors of other
layers. The codes and the size in bytes do not change. The two numbers of each row are trained in
all layers at once, to minimise the KL divergence between the model's scores and the original's on
the calibration data (for models without such scores, the squared distance of the outputs). Each
step runs forward and backward over the whole model in float32, with the weights of all compressed
experts in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moec.errors import NoMatch
from moec.ir.formats import ternary
from moec.ir.formats.compressed import codes_in
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.upcast import widen
from moec.passes.approximate.training.case_training import case_order, output_distance, train
from moec.passes.calibration.evaluator import Evaluator, float32
from moec.passes.calibration.session import Change
from moec.passes.core.moe_layer import Layer, layer_of, name_of
from moec.passes.core.options import option, validate
from moec.passes.core.runner import Log

Grids = Mapping[str, Tensor]
"""The grids bf16[E, N, 2] by name."""


@dataclass(frozen=True)
class TuneGrids:
    """Train the values of compressed experts' codes, in all layers at once."""

    steps: int = option(100, "steps of training, each on one case of the calibration data", low=1)
    rate: float = option(0.005, "relative change of the values in a step", low=0, high=1)
    seed: int = option(0, "seed of the order of the cases", low=0)
    name: ClassVar[str] = "tune-grids"
    source: ClassVar[str] = "end-to-end training of quantisation parameters: arXiv 2407.11062"

    def __post_init__(self) -> None:
        validate(self)

    def observe(
        self, program: Program, evaluator: Evaluator, log: Log
    ) -> tuple[Sequence[Layer], Iterator[Grids]]:
        layers = []
        for op in program.graph.ops:
            if op.name == "moe.experts":
                try:
                    if not _grids(program.graph, op):
                        raise NoMatch("the experts are not compressed: run compress-experts first")
                    layers.append(layer_of(program.graph, op))
                except NoMatch as why:
                    log.decline(name_of(op), str(why))
        grids = train_grids(program, evaluator, self.steps, self.rate, self.seed) if layers else {}
        return layers, (
            {grid.name: grids[grid.name] for grid in _grids(program.graph, layer.experts)}
            for layer in layers
        )

    def change(self, program: Program, layer: Layer, stats: Grids) -> Change:
        moved = [
            float((grid.float() - program.weights[name].float()).norm() / grid.float().norm())
            for name, grid in stats.items()
        ]
        members = tuple((expert,) for expert in range(layer.count))
        says = f"numbers moved by {', '.join(f'{share:.1%}' for share in moved)}"
        return Change(replace(program, weights={**program.weights, **stats}), members, says)


def _grids(graph: Graph, experts: Op) -> list[Value]:
    """The grids of the experts' compressed weights."""
    sources = [graph.producers.get(stack) for stack in experts.inputs[2:]]
    return [op.inputs[-1] for op in sources if op is not None and op.name == "moe.decompress"]


def train_grids(
    program: Program, evaluator: Evaluator, steps: int, rate: float, seed: int
) -> Grids:
    """All grids of the program, trained by Adam with cosine decay of the learning rate to 0."""
    outputs = tuple(program.graph.outputs[i] for i in evaluator.outputs)
    graph = widen(replace(program.graph, outputs=outputs, states=()))
    stacks = [op for op in graph.ops if op.name == "moe.decompress"]
    codes = [_codes(program, op) for op in stacks]
    grids = [program.weights[op.inputs[-1].name].float() for op in stacks]
    factors = [torch.ones_like(grid, requires_grad=True) for grid in grids]
    states = [program.weights[state.before.name] for state in program.graph.states]
    params = [float32(program.weights[param.name]) for param in graph.params]
    cases = evaluator.calibration.cases

    def distance(case: int) -> Tensor:
        weights = {
            op.outputs[0]: ternary.values(stack_codes, _scale_grid(grid, factor))
            for op, stack_codes, grid, factor in zip(stacks, codes, grids, factors, strict=True)
        }
        inputs = [float32(tensor) for tensor in (*cases[case], *states)]
        meanings = {"moe.decompress": lambda op, *_: weights[op.outputs[0]]}
        results = run_graph(graph, [*inputs, *params], meanings=meanings)
        return output_distance(results, evaluator.results[case], evaluator.text)

    for _ in train(factors, rate, case_order(len(cases), steps, seed), distance):
        pass
    with torch.no_grad():
        return {
            op.inputs[-1].name: _scale_grid(grid, factor).bfloat16()
            for op, grid, factor in zip(stacks, grids, factors, strict=True)
        }


def _codes(program: Program, op: Op) -> Tensor:
    parts = [program.weights[value.name] for value in op.inputs]
    width = op.attrs["width"]
    assert isinstance(width, int)
    return codes_in(parts, width)


def _scale_grid(grid: Tensor, factor: Tensor) -> Tensor:
    """The grid times `factor`, at least 0.01: signs stay."""
    return grid * factor.clamp(min=0.01)
