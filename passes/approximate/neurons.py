"""The axes of an expert's weights that count its hidden neurons, whose order is arbitrary."""

from __future__ import annotations

from collections.abc import Mapping

from moec.errors import NoMatch
from moec.ir.graph import Graph, Value
from moec.ir.traits import IDENTITIES, is_pointwise


def neuron_axes(body: Graph) -> Mapping[Value, int]:
    """The axis of the hidden neurons of each param that has one: 0 for a weight [H, D] or a bias
    [H] of the first layers, 1 for a weight [D, H] of the last.

    Raises NoMatch if the body is not linear layers, functions of each element, and linear
    layers again, so that neurons cannot be put in another order.
    """
    axes: dict[Value, int] = {}
    hidden: set[Value] = set()
    outer: set[Value] = {body.inputs[0]}
    for op in body.ops:
        rows = [v for v in op.inputs if v not in body.params]
        output = op.outputs[0]
        if (
            op.name == "aten.linear.default"
            and op.inputs[0] in outer
            and output not in body.results
        ):
            axes |= dict.fromkeys(op.inputs[1:], 0)
            hidden.add(output)
        elif op.name == "aten.linear.default" and op.inputs[0] in hidden:
            axes[op.inputs[1]] = 1
            outer.add(output)
        elif (is_pointwise(op) or op.name in IDENTITIES) and rows:
            reads_hidden = {v in hidden for v in rows}
            if len(reads_hidden) > 1:
                raise NoMatch(f"an expert's body adds {output.name} to what enters it")
            vectors = [v for v in op.inputs if v in body.params and v.shape]
            if reads_hidden == {True}:
                axes |= dict.fromkeys(vectors, 0)
            (hidden if reads_hidden == {True} else outer).add(output)
        else:
            raise NoMatch(f"an expert's body holds {op.name}, which may mix its neurons")
    if not hidden or not set(body.results) <= outer:
        raise NoMatch("an expert has no hidden neurons that could be aligned")
    sizes = {param.shape[axis] for param, axis in axes.items()}
    if len(sizes) > 1:
        raise NoMatch(f"an expert's hidden layers have {sorted(map(str, sizes))} neurons")
    return axes
