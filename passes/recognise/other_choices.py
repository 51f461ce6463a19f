"""Choices that belong to no recognised block, reported if the graph has no block at all.

Masked attention heads and tokens that a layer skips (mixture of depths) are chosen by the same ops
as experts. A graph with such a choice and no block gets a report that names the choice.
"""

from __future__ import annotations

from collections.abc import Iterator

from moec.dtypes import FLOATS
from moec.ir.graph import Op
from moec.ir.traits import CHOICES
from moec.passes.recognise.region import Scope

RULE = "other-choices"
"""The rule under which the reasons are logged: if a model is compiled in pieces, the experts may be
in another piece."""
_MOST_EXPERTS = 1024
"""A choice among more is one of words in a vocabulary."""


def other_choices(scope: Scope) -> Iterator[tuple[Op, str]]:
    """Choices whose results the graph reads, each with a text that says what is chosen."""
    for op in scope.graph.ops:
        if op.name not in CHOICES or op.inputs[0].dtype not in FLOATS or not op.inputs[0].shape:
            continue
        if not any(scope.graph.readers.get(value) for value in op.outputs):
            continue
        dim = op.attrs.get("dim", -1)
        among = op.inputs[0].shape[dim if isinstance(dim, int) else -1]
        if not isinstance(among, int):
            yield op, f"{op.name} chooses among {among} rows: it chooses rows, not experts"
        elif 1 < among <= _MOST_EXPERTS:
            yield (
                op,
                f"{op.name} chooses among {among}, and the choices are not experts: no product "
                "with weights of a single choice follows",
            )
