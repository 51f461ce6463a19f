"""Record which experts a model chooses: routers as further outputs of its recognised graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from moec.errors import UsageError
from moec.interpret.evaluate import evaluate
from moec.ir.graph import Op, Program
from moec.plan.routing_trace import RoutingTrace


def record_routing(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    args: Sequence[Any] = (),
    **options: Any,
) -> RoutingTrace:
    """The choices of every MoE layer on `batches`, each a step; every row of the first axis is a
    request. Options are those of `moec.compile`; nothing is compiled.

    Raises CaptureError, and UsageError where no router is recognised.
    """
    from moec.api import compile as compile_model

    compiled = compile_model(model, args, **options, verify=False, stop_after="split-packed")
    return record(compiled.steps[-1].program, batches)


def record(program: Program, batches: Iterable[Mapping[str, torch.Tensor]]) -> RoutingTrace:
    """As `record_routing`, for a program in stage MOE."""
    graph = program.graph
    dispatches = [op for op in graph.ops if op.name == "moe.dispatch"]
    if not dispatches:
        raise UsageError("no router is recognised: moec inspect says why")
    choices = tuple(op.inputs[1] for op in dispatches)
    watched = replace(graph, outputs=choices, states=())
    experts = np.array([_experts(op) for op in dispatches], np.int32)
    widest = max(cast(int, value.shape[1]) for value in choices)
    parts: list[np.ndarray[Any, np.dtype[np.int16]]] = []
    steps: list[int] = []
    requests: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    start = 0
    for batch in batches:
        inputs = [batch[value.name] for value in graph.inputs]
        ids = evaluate(watched, inputs, program.weights)
        rows = len(ids[0])
        layers = [
            _padded(layer, int(count), widest) for layer, count in zip(ids, experts, strict=True)
        ]
        parts.append(np.stack(layers, axis=1))
        steps.append(rows)
        count = max(1, len(inputs[0]))
        requests.append((start + np.arange(rows) * count // max(1, rows)).astype(np.int32))
        start += count
    if not parts:
        raise UsageError("there is no batch to record")
    tokens = sum(steps)
    return RoutingTrace(
        np.concatenate(parts),
        np.repeat(np.arange(len(steps), dtype=np.int32), steps),
        np.zeros(tokens, np.uint8),
        np.concatenate(requests),
        experts,
    )


def _experts(op: Op) -> int:
    return cast(int, op.attrs["num_experts"])


def _padded(ids: torch.Tensor, experts: int, width: int) -> np.ndarray[Any, np.dtype[np.int16]]:
    """[T, width]: ids of no expert, and choices that this layer does not have, are -1."""
    array = ids.numpy().astype(np.int16)
    array = np.where(array < experts, array, -1)
    return np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1)
