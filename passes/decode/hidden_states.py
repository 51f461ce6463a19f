"""A language model without its head, for embeddings.

logits[B, S, V] = linear(h[B, S, D], head)   ->   h[B, S, D]
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.passes.core.rewrite import drop_dead
from moec.passes.decode import logits_of


def without_head(program: Program) -> Program:
    """The program whose output is what the head reads: the last op before the logits that has a
    matrix of weights. Raises NoMatch where it is not one row for each token, or there are states.
    """
    graph = program.graph
    if graph.states:
        raise NoMatch(f"the model has its own state, {graph.states[0].before.name}")
    value = logits = logits_of(graph)
    matrices = {param for param in graph.params if len(param.shape) > 1}
    while (op := graph.producers.get(value)) is not None:
        value = next((v for v in op.inputs if v not in graph.params), value)
        if matrices.intersection(op.inputs) or value in op.outputs:
            break
    if value.shape[:-1] != logits.shape[:-1] or op is None:
        raise NoMatch(f"the head reads {value}, which is not one row for each token")
    hidden = drop_dead(replace(graph, outputs=(value,)))
    weights = {param.name: program.weights[param.name] for param in hidden.params}
    return Program(hidden, weights)
