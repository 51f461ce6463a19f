"""Trains the routers of a model that choices changed, so that it writes what the original does.

    w, ids = moe.gate(x, router)   ->   w, ids = moe.gate(x, router')

Runs last, with experts, top-k, formats and codes as they were chosen: the experts' errors differ,
and a router that was trained for exact ones does not know of them. The weights and biases of
routers are trained in float32, together, to minimise the KL divergence between the model's next
token and the original's (for a model that is no language model, the squared relative error of its
outputs). The choice of experts has no derivative: the weights of the chosen ones carry it, and rows
that kernels round count as not rounded. A part of the data is held out, and the state that is best
on it stays, with weights rounded to their dtype; that is the state before, if no other is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from moec.dtypes import FLOATS
from moec.errors import SetupError
from moec.ir.graph import Graph, Program, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.interpret.threads import copied, gradients_needed, threads_for
from moec.ir.opdef import inputs_of
from moec.passes.approximate.training.case_training import case_order, output_distance, train
from moec.passes.calibration.data import Calibration, load_calibration
from moec.passes.calibration.evaluator import Evaluator, float32
from moec.passes.calibration.session import CalibrationSession
from moec.passes.core.runner import Kind, Log, OptInPass
from moec.passes.quantise.quantise_linears import LINEAR, logits_and_sums

RATES = (0.001, 0.005, 0.03)
"""Changes of a weight in the first step, relative to the root mean square of its matrix. Each takes
its part of the steps from the start: the greater the damage, the greater the one that is best."""
WINDOWS, CASES = 128, 64
"""Windows of a text, more than choices are measured on, and the cases of one step each."""
HELD_OUT = 8
"""Of so many cases one is held out."""
CHECKS = 5
"""How often the held-out part is measured for each rate."""
SEED = 0

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RecoverRouters(OptInPass):
    """Train the routers, and nothing else, after choices are applied (moec optimize --recover)."""

    steps: int
    session: CalibrationSession | None = None
    name: ClassVar[str] = "recover-routers"
    source: ClassVar[str] = ""
    kind: ClassVar[Kind] = Kind.CHANGES

    def run(self, program: Program, log: Log) -> Program:
        session = self.session
        assert session is not None
        assert session.original is not None, "ChooseExperts runs before"
        trained, held_out = training_data(session.calib, session.original, session.files)
        with threads_for(0):  # several threads add up the same numbers in no fixed order
            evaluator = Evaluator(session.original, held_out)
            before = best = _distance(evaluator, program)
            weights: Weights = {}
            for i, rate in enumerate(RATES):
                steps = (self.steps + i) // len(RATES)
                for candidate in _states(program, evaluator, trained, steps, rate):
                    distance = _distance(evaluator, with_weights(program, candidate))
                    if distance < best:
                        best, weights = distance, candidate
        metric = "squared error" if evaluator.text is None else "kl"
        on = f"on {held_out.tokens} of {held_out.tokens + trained.tokens} tokens, held out"
        did = f"{len(router_weights(program.graph))} tensors of routers, {self.steps} steps"
        if not weights:
            log.says.append(f"{did}: nothing better than {metric} {before:.3g} {on}: not changed")
            return program
        if not log.spend(did):
            return program
        log.says.append(f"{did}: {metric} {before:.3g} before, {best:.3g} after, {on}")
        stored = {name: log.memory.tensor(tensor) for name, tensor in weights.items()}
        return with_weights(program, stored)


def training_data(
    calib: Any, program: Program, files: Mapping[str, bytes]
) -> tuple[Calibration, Calibration]:
    """The data to train on, and those that are held out, evenly spread. Raises UsageError for data
    that are one case."""
    data = load_calibration(calib, program, files, WINDOWS, CASES)
    if len(data.cases) < 2:
        raise SetupError(
            "recover needs data of which a part can be held out, and these are one case: give a "
            "text of two windows, or inputs of two sequences"
        )
    each = min(HELD_OUT, len(data.cases))
    held_out = data.cases[each - 1 :: each]
    rest = tuple(case for i, case in enumerate(data.cases) if i % each != each - 1)
    tokens = data.tokens * sum(len(c[0]) for c in held_out) // sum(len(c[0]) for c in data.cases)
    return Calibration(rest, data.tokens - tokens), Calibration(held_out, tokens)


def router_weights(graph: Graph) -> tuple[Value, ...]:
    """The stored weights and biases of linear layers whose results choose experts, and that
    nothing else reads."""
    linears, _ = logits_and_sums(graph)
    ops = [op for op in graph.ops if op.name == "moe.gate" or op in linears]
    values: dict[Value, None] = {}
    for op in ops:
        if op.name == "moe.gate":
            parts = inputs_of(op)
            values |= dict.fromkeys(v for v in (parts["weight"], parts["bias"]) if v is not None)
        elif op.name == LINEAR:
            values |= dict.fromkeys(op.inputs[1:])
    params = set(graph.params)
    return tuple(
        v for v in values
        if v in params and v.dtype in FLOATS and set(graph.readers[v]) <= set(ops)
    )  # fmt: skip


def with_weights(program: Program, weights: Weights) -> Program:
    return replace(program, weights={**program.weights, **weights})


def _distance(evaluator: Evaluator, program: Program) -> float:
    distance = evaluator.measure(program)[0]
    return distance.error**2 if distance.kl is None else distance.kl


def _states(
    program: Program, evaluator: Evaluator, data: Calibration, steps: int, rate: float
) -> Iterator[Weights]:
    """The routers' weights in their dtypes, CHECKS times in `steps` steps of training."""
    graph, weights, states = evaluator.widened(program)
    wide = {name: tensor.detach() for name, tensor in weights.items()}
    first = {v.name: wide[v.name] for v in router_weights(program.graph)}
    scales = {name: float(t.square().mean().sqrt()) or 1.0 for name, t in first.items()}
    moves = {name: torch.zeros_like(t, requires_grad=True) for name, t in first.items()}
    order = case_order(len(data.cases), steps, SEED)
    originals = evaluator.run(evaluator.original, (), [data.cases[i] for i in order])

    def moved() -> dict[str, Tensor]:
        return {name: first[name] + scales[name] * move for name, move in moves.items()}

    def loss(case: int) -> Tensor:
        inputs = [float32(tensor) for tensor in (*data.cases[case], *states)]
        with torch.enable_grad():
            params = {**wide, **moved()}
            tensors = [*inputs, *(params[param.name] for param in graph.params)]
            results = run_graph(graph, tensors, meanings={"aten.copy.default": copied})
            return output_distance(results, next(originals), evaluator.text)

    checked = {steps * n // CHECKS for n in range(1, CHECKS + 1)}
    needed = f"recover needs gradients of the routers' weights of {graph.name}"
    with gradients_needed(needed, "leave recover out"):
        for step in train(tuple(moves.values()), rate, order, loss):
            if step in checked:
                yield {
                    name: t.detach().to(program.weights[name].dtype) for name, t in moved().items()
                }
