"""Loops over experts in which each takes a limited number of its rows.

    t = where(ids == e)                             the first C
    t = t[numbers[t].argsort()]                     or the C of the least numbers
    out = x.clone(); out[t[:C]] = expert_e(x[t[:C]])    others keep what they are

Rows that are written over a copy of the tokens, and not added, leave the dropped ones as they came:
these have an expert without a network, a copy. The list of an expert's rows is as long as the data
say, and the limit is seen in the length of its part: min(rows, C).
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.dims import Dim, canonical, symbols
from moec.ir.graph import Op, Value
from moec.ir.traits import VIEWS
from moec.passes.recognise.block import Priority, RecognisedCapacity, Zero
from moec.passes.recognise.region import Scope

_PARTS = VIEWS | {"aten.slice.Tensor", "aten.split_with_sizes.default"}


def overwritten(
    scope: Scope, start: Value | None, links: Sequence[tuple[Op, Value]], x: Value
) -> Zero | None:
    """A copy for the rows that no expert took, where all results are written over the tokens."""
    written = all(
        op.name == "aten.index_put.default"
        and not op.attrs.get("accumulate")
        and value is op.inputs[-1]
        for op, value in links
    )
    copied = start is not None and scope.behind(start) is scope.behind(x)
    return Zero(("copy",)) if written and copied else None


def limit(scope: Scope, rows: Sequence[Value]) -> RecognisedCapacity | None:
    """The limit of the lists of rows of all experts, where they have one and the same."""
    limits = [_limit(scope, value) for value in rows]
    return limits[0] if limits and all(one == limits[0] for one in limits) else None


def _limit(scope: Scope, rows: Value) -> RecognisedCapacity | None:
    size = _least(scope, rows.shape[0]) if rows.shape else None
    if size is None:
        return None
    op = scope.made_by(scope.behind(rows, _PARTS), "aten.index.Tensor")
    if op is None or len(op.inputs) != 2:
        return RecognisedCapacity(size, "token")
    order = scope.made_by(op.inputs[1], "aten.sort.default", "aten.sort.stable")
    read = scope.made_by(order.inputs[0], "aten.index.Tensor") if order is not None else None
    if order is None or read is None or read.inputs[1:] != (op.inputs[0],):
        return RecognisedCapacity(size, "token")
    priority = Priority(read.inputs[0], bool(order.attrs.get("descending", False)))
    return RecognisedCapacity(size, "token", priority)


def _least(scope: Scope, count: Dim) -> Dim | None:
    """C of min(rows, C), of which only the rows depend on the data."""
    if isinstance(count, int) or count.func.__name__ != "Min":  # sympy's, or PyTorch's own
        return None
    sizes = {name for value in scope.graph.inputs for dim in value.shape for name in symbols(dim)}
    fixed = [canonical(part) for part in count.args if symbols(canonical(part)) <= sizes]
    return fixed[0] if len(fixed) == 1 else None
