"""Loops over experts in which each expert takes a limited number of its rows.

    t = where(ids == e)                             the first C
    t = t[numbers[t].argsort()]                     or the C with the smallest numbers
    out = x.clone(); out[t[:C]] = expert_e(x[t[:C]])    other rows keep their value

    out = zeros; ..; out[dropped] = x[dropped]      dropped: the rest of each t

If the results overwrite a copy of the tokens instead of being added, or the other rows are written
after all experts, dropped rows keep their input: they are given to a copy expert, which has no
network. The number of an expert's rows depends on the
data; the limit C is read from the length of the slice, min(rows, C).
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, canonical, symbols
from moec.ir.traits import VIEWS
from moec.passes.recognise.reading.block import Priority, RecognisedCapacity, Zero
from moec.passes.recognise.region import Scope

_PARTS = VIEWS | {"aten.slice.Tensor", "aten.split_with_sizes.default"}


def overwritten(
    scope: Scope, start: Value | None, links: Sequence[tuple[Op, Value]], x: Value
) -> Zero | None:
    """A copy expert for the rows that no expert takes, if all results overwrite a copy of the
    tokens."""
    written = all(
        op.name == "aten.index_put.default"
        and not op.attrs.get("accumulate")
        and value is op.inputs[-1]
        for op, value in links
    )
    copied = start is not None and scope.source_of(start) is scope.source_of(x)
    return Zero(("copy",)) if written and copied else None


def passed_through(scope: Scope, last: Op) -> Op | None:
    """The op after the last expert that writes the tokens themselves into the rows that no expert
    takes: `out[dropped] = x[dropped]`."""
    readers = scope.graph.readers.get(last.outputs[0], ())
    if len(readers) != 1 or last.outputs[0] in scope.results:
        return None
    (op,) = readers
    if op.name != last.name or op.name != "aten.index_put.default" or op.attrs.get("accumulate"):
        return None
    picked = scope.made_by(op.inputs[-1], "aten.index.Tensor")
    if len(op.inputs) != 3 or picked is None or picked.inputs[1:] != op.inputs[1:2]:
        return None
    parts = scope.made_by(op.inputs[1], "aten.cat.default")
    return op if parts is not None else None


def limit(scope: Scope, rows: Sequence[Value]) -> RecognisedCapacity | None:
    """The capacity that the row lists of all experts have in common; None if they have none.

    Raises NoMatch if they differ: a proof need not have as many rows as the greatest.
    """
    limits = list(dict.fromkeys(_limit(scope, value) for value in rows))
    if len(limits) > 1:
        sizes = ", ".join("any" if limit is None else str(limit.size) for limit in limits)
        raise NoMatch(f"its experts take at most different numbers of rows: {sizes}")
    return limits[0] if limits else None


def _limit(scope: Scope, rows: Value) -> RecognisedCapacity | None:
    size = _least(scope, rows.shape[0]) if rows.shape else None
    if size is None:
        return None
    op = scope.made_by(scope.source_of(rows, _PARTS), "aten.index.Tensor")
    if op is None or len(op.inputs) != 2:
        return RecognisedCapacity(size, "token")
    order = scope.made_by(op.inputs[1], "aten.sort.default", "aten.sort.stable")
    read = scope.made_by(order.inputs[0], "aten.index.Tensor") if order is not None else None
    if order is None or read is None or read.inputs[1:] != (op.inputs[0],):
        return RecognisedCapacity(size, "token")
    priority = Priority(read.inputs[0], bool(order.attrs.get("descending", False)))
    return RecognisedCapacity(size, "token", priority)


def _least(scope: Scope, count: Dim) -> Dim | None:
    """C of min(rows, C): the one operand that does not depend on data."""
    if isinstance(count, int) or count.func.__name__ != "Min":  # the Min of sympy or of PyTorch
        return None
    sizes = {name for value in scope.graph.inputs for dim in value.shape for name in symbols(dim)}
    fixed = [canonical(part) for part in count.args if symbols(canonical(part)) <= sizes]
    return fixed[0] if len(fixed) == 1 else None
