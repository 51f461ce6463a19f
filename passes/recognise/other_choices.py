"""Choices behind which no form finds experts: what is said of a graph of which nothing else is.

Heads of attention that are masked, and tokens that are let through a layer (mixture of depths), are
chosen as experts are. A graph with such a choice and no block says so, rather than nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from moec.dtypes import FLOATS
from moec.ir.graph import Op
from moec.ir.traits import CHOICES
from moec.passes.recognise.region import Scope

RULE = "other-choices"
"""What these reasons are told by: in a piece of a model, the experts may be in another piece."""
_MOST_EXPERTS = 1024
"""More are words of a vocabulary."""


def other_choices(scope: Scope) -> Iterator[tuple[Op, str]]:
    """Choices whose results are read further in the graph, and what is chosen there."""
    for op in scope.graph.ops:
        if op.name not in CHOICES or op.inputs[0].dtype not in FLOATS or not op.inputs[0].shape:
            continue
        if not any(scope.graph.readers.get(value) for value in op.outputs):
            continue
        dim = op.attrs.get("dim", -1)
        among = op.inputs[0].shape[dim if isinstance(dim, int) else -1]
        if not isinstance(among, int):
            yield op, f"{op.name} chooses among {among} rows: rows are chosen, and no experts"
        elif 1 < among <= _MOST_EXPERTS:
            yield (
                op,
                f"{op.name} chooses among {among}, and what it chooses is no network of its own: "
                "no product with weights of one choice alone is found behind it",
            )
