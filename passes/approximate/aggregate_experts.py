"""Combines the experts of two models of one architecture, with one router over all of them.

    logits = aten.linear(x, a[E, D])              logits = aten.linear(x, cat(a, b)[2*E, D])
    w, ids = moe.route(logits)                    w, ids = moe.route(logits)
    … = moe.dispatch(x, ids) <E>           ->     … = moe.dispatch(x, ids) <2*E>
    out = moe.experts(…, w1[E, H, D])             out = moe.experts(…, cat(w1, v1)[2*E, H, D])

Aggregation of experts (arXiv 2109.10465): two models that were trained separately become the start
of a larger model's training. Each expert keeps its logit; every other weight is the mean of the two
models'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.ops.routing.routing import widened
from moec.passes.core.moe_layer import Layer, Splice, constant, layer_of, name_of, replace_experts
from moec.passes.core.options import Model, option, validate
from moec.passes.core.router_columns import logits_linear, with_weights
from moec.passes.core.runner import Kind, Log, Pass


@dataclass(frozen=True)
class AggregateExperts(Pass):
    """Add the experts of another model of the same architecture to the model's experts.

    `other` is a model as `moec.compile` takes it (except an exported program), or its weights by
    name; where it is text, `moec.pipeline.prepare` opens it. The result is checked against its own
    graph, since it equals neither model.
    """

    other: Model = field(
        default="", metadata={"says": "the second model: a checkpoint folder, or file.py:factory"}
    )
    average: bool = option(
        True, "weights outside the experts: the mean of both models, or the first model's"
    )
    name: ClassVar[str] = "aggregate-experts"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    kind: ClassVar[Kind] = Kind.CHANGES
    source: ClassVar[str] = "aggregation of experts: arXiv 2109.10465"

    def __post_init__(self) -> None:
        validate(self)

    def run(self, program: Program, log: Log) -> Program:
        """Raises UsageError if the models, or any two of their layers, cannot be aggregated."""
        other = Program(program.graph, _match_weights(program, _weights(self.other)))
        experts = [op for op in program.graph.ops if op.name == "moe.experts"]
        if not experts:
            raise UsageError("aggregate-experts: the model has no MoE blocks that were recognised")
        if not log.spend(f"experts of {len(experts)} layers"):
            return program
        splice = Splice(program)
        for op in experts:
            try:
                layer = layer_of(program.graph, op)
                _concatenate_experts(splice, layer, other)
            except NoMatch as why:
                raise UsageError(f"aggregate-experts at {name_of(op)}: {why}") from None
            log.says.append(f"{layer.name}: {layer.count} and {layer.count} experts")
        aggregated = splice.done()
        return _average_weights(aggregated, other) if self.average else aggregated


def _concatenate_experts(splice: Splice, layer: Layer, other: Program) -> None:
    program = splice.program
    logits, *correction = layer.route.inputs
    behind = logits_linear(program, logits)
    if behind is None:
        raise NoMatch("the router's logits do not come from a linear layer with a stored weight")
    if layer.routing.groups > 1:
        raise NoMatch("the router chooses among groups of experts, which differ between models")

    def concatenate(value: Value) -> torch.Tensor:
        return torch.cat([constant(program, value), constant(other, value)])

    ops: list[Op] = []
    logits = with_weights(splice, behind, [concatenate(v) for v in behind[0].inputs[1:]], ops)
    more = [splice.weight(value.name, concatenate(value)) for value in correction]
    splice.put(layer.route, [*ops, replace(layer.route, inputs=(logits, *more))])
    replace_experts(splice, layer, [concatenate(stack) for stack in layer.stacks])


def _average_weights(program: Program, other: Program) -> Program:
    """The program with the mean of the weights that both models have, in float32 or wider."""
    weights = dict(program.weights)
    for name in weights.keys() & other.weights.keys():
        a, b = weights[name], other.weights[name]
        if a.is_floating_point() and a.shape == b.shape:
            weights[name] = ((widened(a) + widened(b)) / 2).to(a.dtype)
    return replace(program, weights=weights)


def _match_weights(
    program: Program, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The other model's weights, with the names, shapes and dtypes of the program's.

    Raises UsageError if one is missing, or has another shape or other integers.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in program.weights.items():
        counterpart = tensors.get(name)
        if counterpart is None:
            raise UsageError(
                f"aggregate-experts: the other model has no weight {name}: give one of the same "
                "architecture"
            )
        if counterpart.shape != tensor.shape:
            raise UsageError(
                f"aggregate-experts: {name} is {list(tensor.shape)}, and "
                f"{list(counterpart.shape)} in the other model: give one of the same architecture"
            )
        if not tensor.is_floating_point() and not torch.equal(counterpart, tensor):
            raise UsageError(
                f"aggregate-experts: {name} has different integers in the other model, whose "
                "mean is not defined"
            )
        weights[name] = counterpart.detach().to(tensor.dtype)
    return weights


def _weights(other: Any) -> Mapping[str, torch.Tensor]:
    if isinstance(other, Mapping):
        return other
    if not isinstance(other, torch.nn.Module):
        raise UsageError(
            "aggregate-experts: other is the second model: give the folder of a checkpoint, "
            "file.py:factory, a module or its weights by name"
        )
    tensors = (*other.named_parameters(remove_duplicate=False), *other.named_buffers())
    return dict(tensors)
