"""One slice of every expert's hidden width: expert-slicing (DeepSpeed-MoE, arXiv 2201.05596).

    h = f(x @ w1.T, x @ w3.T)          h' = f(x @ w1[slice].T, x @ w3[slice].T)
    y = h @ w2.T + b             ->    y' = h' @ w2[:, slice].T (+ b on slice 0)

The sum of y' over the slices is y, because f is element-wise and w2 sums over the hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim

_LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class Sliced:
    """The body of one slice, and the axis along which each of its params is cut. An axis of None:
    slice 0 has the full param, the other slices have zeros."""

    body: Graph
    axes: Mapping[Value, int | None]


def slice_body(body: Graph, slices: int) -> Sliced:
    """The body of one of `slices` slices. Raises NoMatch unless the body is linear layers,
    element-wise ops, and a linear layer."""
    last = body.producers.get(body.outputs[0])
    if last is None or last.name != _LINEAR:
        raise NoMatch("an expert does not end in a linear layer, and cannot be split into slices")
    hidden = last.inputs[0].shape[-1]
    if not isinstance(hidden, int) or hidden % slices:
        raise NoMatch(f"a hidden width of {hidden} cannot be split into {slices} slices")
    axes: dict[Value, int | None] = {last.inputs[1]: 1}
    if len(last.inputs) > 2:
        axes[last.inputs[2]] = None
    x, width = body.inputs[0], hidden // slices
    ops: list[Op] = []
    new: dict[Value, Value] = {x: x}
    for op in body.ops:
        if op is last:
            continue
        if op.name == _LINEAR and op.inputs[0] is x:
            if op.inputs[1].shape[0] != hidden:
                raise NoMatch(
                    "an expert has several projections in one weight: run split-packed first"
                )
            axes |= dict.fromkeys(op.inputs[1:], 0)
        elif not all(v in axes or v.shape == op.outputs[0].shape for v in op.inputs):
            raise NoMatch(f"{op.name} inside an expert is not element-wise")
        elif x in op.inputs:
            raise NoMatch(f"{op.name} inside an expert mixes its input with hidden values")
        ops.append(op)
    params = tuple(_cut(param, axes.get(param, -1), width) for param in body.params)
    new |= dict(zip(body.params, params, strict=True))
    cut: list[Op] = []
    for op in ops:
        outputs = tuple(Value(v.name, _narrow(v.type, width)) for v in op.outputs)
        cut.append(replace(op, inputs=tuple(new[v] for v in op.inputs), outputs=outputs))
        new |= dict(zip(op.outputs, outputs, strict=True))
    cut.append(replace(last, inputs=tuple(new[v] for v in last.inputs)))
    return Sliced(replace(body, params=params, ops=tuple(cut)), axes)


def _narrow(type: TensorType, width: Dim) -> TensorType:
    return TensorType(type.dtype, (*type.shape[:-1], width))


def _cut(param: Value, axis: int | None, width: int) -> Value:
    if axis is None:
        return param
    if axis < 0:
        raise NoMatch(f"{param.name} of an expert is not the weight of a linear layer")
    shape = tuple(width if i == axis else size for i, size in enumerate(param.shape))
    return Value(param.name, TensorType(param.dtype, shape))
