"""Values that depend only on a token's position: cos and sin, learned positions, scales.

They are computed for B*S tokens instead of S, from positions that the caller provides, and are
reshaped to B by S tokens where an op of the model reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, canonical, symbols
from moec.passes.decode.tokenwise import has_tokens, is_elementwise

_LINES = ("aten.arange.start_step", "aten.arange.default", "aten.arange.start")


def position_values(graph: Graph, batch: sympy.Symbol, sequence: sympy.Symbol) -> set[Value]:
    """The values with an axis of tokens that depend on no input."""
    fixed = set(graph.params)
    positions: set[Value] = set()
    for op in graph.ops:
        if not all(v in fixed or v in positions for v in op.inputs):
            continue
        for value in op.outputs:
            if not has_tokens(value, sequence.name):
                fixed.add(value)
            elif batch.name not in {name for dim in value.shape for name in symbols(dim)}:
                positions.add(value)
    return positions


def counts_tokens(op: Op, sequence: sympy.Symbol) -> bool:
    """Whether an op counts the tokens from 0.

    Raises NoMatch for an arange with another start or step.
    """
    if op.name not in _LINES:
        return False
    count = (op.attrs.get("start", 0), op.attrs.get("end"), op.attrs.get("step", 1))
    if count != (0, sequence, 1) or op.outputs[0].dtype != "i64":
        raise NoMatch(f"{op.name} at {op.origin} numbers tokens in another way than 0, 1, 2, …")
    return True


@dataclass(frozen=True)
class ResizedTokens:
    """Replaces the size of the tokens in types and attributes."""

    old: sympy.Symbol
    new: Dim

    def dim(self, dim: Dim) -> Dim:
        return dim if isinstance(dim, int) else canonical(dim.subs(self.old, self.new))

    def type(self, type: TensorType) -> TensorType:
        return TensorType(type.dtype, tuple(map(self.dim, type.shape)))

    def attrs(self, attrs: Mapping[str, Attr]) -> dict[str, Attr]:
        return {name: self._attr(value) for name, value in attrs.items()}

    def _attr(self, attr: Attr) -> Attr:
        if isinstance(attr, tuple):
            return tuple(self._attr(item) for item in attr)
        if isinstance(attr, sympy.Expr):
            return self.dim(attr)
        return attr


def broadcast_shape(op: Op, value: Value, batch: Dim, sequence: sympy.Symbol) -> tuple[Dim, ...]:
    """The shape that broadcasts a value of positions, with B*S tokens, in an op over B by S tokens.

    Raises NoMatch if the op does more than broadcast it.
    """
    if not (is_elementwise(op) or op.name == "nn.rotary"):
        raise NoMatch(f"{op.name} at {op.origin} reads the positions of tokens")
    out = op.outputs[0].shape
    shape = (1,) * (len(out) - len(value.shape)) + value.shape
    axes = [axis for axis, dim in enumerate(shape) if sequence.name in symbols(dim)]
    if len(axes) != 1 or shape[axes[0]] != sequence:
        raise NoMatch(f"{op.name} at {op.origin} reads {value}, a table over pairs of tokens")
    (axis,) = axes
    if out.count(batch) != 1 or any(dim != 1 for dim in shape[:axis]) or out.index(batch) > axis:
        raise NoMatch(f"{op.name} at {op.origin} reads {value} and gives {op.outputs[0]}")
    batch_axis = out.index(batch)
    return (*shape[:batch_axis], batch, *shape[batch_axis + 1 :])
