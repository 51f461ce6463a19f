"""A low-rank adapter is merged into the weight of the linear layer that it corrects.

    y = aten.linear(x, w, bias?)
    a = aten.linear(x, down)                 w' = w + 2 * up @ down
    b = aten.linear(a, up)            ->     z = aten.linear(x, w', bias?)
    z = aten.add(y, aten.mul(b, 2))

Three products become one. Experts that share one frozen layer and have an adapter each (Uni-MoE)
become experts with full weights, which are recognised (adapters are not) but take more memory. The
sum is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.stats import stored_bytes
from moec.passes.core.moe_layer import constant
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FoldLora(Pass):
    """Add low-rank adapters to the weights that they correct."""

    name: ClassVar[str] = "fold-lora"
    takes: ClassVar[Stage] = Stage.ATEN
    gives: ClassVar[Stage] = Stage.ATEN
    source: ClassVar[str] = "LoRA, arXiv 2106.09685, 4.1; as experts: Uni-MoE, arXiv 2405.11273"

    def run(self, program: Program, log: Log) -> Program:
        merged: dict[str, torch.Tensor] = {}

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            return fold_lora(op, b, program, merged)

        graph = rewrite(program.graph, rule, log)
        tensors = {**program.weights, **merged}
        stored = (*graph.params, *(state.before for state in graph.states))
        folded = Program(graph, {value.name: tensors[value.name] for value in stored})
        more = stored_bytes(folded) - stored_bytes(program)
        what = "more" if more >= 0 else "fewer"
        log.says.append(f"{log.rewrites} adapters; {abs(more):,} bytes of weights {what}")
        return folded


def fold_lora(
    op: Op, b: Builder, program: Program, merged: dict[str, torch.Tensor]
) -> Sequence[Value] | None:
    if op.name != "aten.add.Tensor" or len(op.inputs) != 2:
        return None
    sides = [(op.inputs[0], op.inputs[1]), (op.inputs[1], op.inputs[0])]
    for base, adapter in sides:
        layer, layers = b.producers.get(base), _adapter(adapter, b)
        if layer is not None and layer.name == "aten.linear.default" and layers is not None:
            break
    else:
        return None
    down, up, factors = layers
    x, weight, *bias = layer.inputs
    if down.inputs[0] is not x:
        raise NoMatch(f"the layer reads {x.name}, and its adapter {down.inputs[0].name}")
    if len(down.inputs) > 2 or len(up.inputs) > 2:
        raise NoMatch("the adapter has a bias, which cannot be added to the weight")
    if op.attrs.get("alpha", 1) != 1:
        raise NoMatch(f"the sum counts one side {op.attrs['alpha']} times")
    if base.type != op.outputs[0].type:
        raise NoMatch(f"the layer returns {base.type}, and the sum {op.outputs[0].type}")
    stored = [_stored(program, merged, v) for v in (weight, down.inputs[1], up.inputs[1])]
    scale = 1.0
    for factor in factors:
        scale *= factor if isinstance(factor, float) else _one(constant(program, factor))
    w, small, large = (tensor.float() for tensor in stored)
    param = b.param(f"{weight.name}.folded", weight.type)
    merged[param.name] = (w + scale * (large @ small)).to(stored[0].dtype)
    return b.emit(layer.name, [x, param, *bias], [base.type], like=op)


def _adapter(value: Value, b: Builder) -> tuple[Op, Op, list[float | Value]] | None:
    """The two linear layers behind a value, and the factors of their result."""
    factors: list[float | Value] = []
    op = b.producers.get(value)
    while op is not None and op.name == "aten.mul.Tensor":
        other = op.attrs.get("other")
        if len(op.inputs) == 2:
            single = [v for v in op.inputs if all(dim == 1 for dim in v.shape)]
            if len(single) != 1:
                return None
            factors.append(single[0])
            value = next(v for v in op.inputs if v is not single[0])
        elif isinstance(other, int | float):
            factors.append(float(other))
            value = op.inputs[0]
        else:
            return None
        op = b.producers.get(value)
    up = op
    down = None if up is None else b.producers.get(up.inputs[0])
    names = {layer.name for layer in (up, down) if layer is not None}
    if up is None or down is None or names != {"aten.linear.default"}:
        return None
    return down, up, factors


def _stored(program: Program, merged: dict[str, torch.Tensor], value: Value) -> torch.Tensor:
    return merged[value.name] if value.name in merged else constant(program, value)


def _one(tensor: torch.Tensor) -> float:
    return float(tensor.reshape(()))
