"""Reasons why rows of one expert are not computed one by one.

An expert of a block computes each row by itself, because a kernel cuts the rows of an expert into
parts. A mean over its rows, or their number, is the same only for all of them together.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import symbols
from moec.passes.recognise.region import Scope, names_in

_LIMIT = 40


def not_row_wise(op: Op, what: str) -> NoMatch:
    """The refusal of an op that `what` describes, with the user's line."""
    return NoMatch(
        f"{op.name} {what}{at_line(op)}, and an expert must compute each row by itself: a row may "
        "not depend on how many or which other rows the expert has"
    )


def at_line(op: Op) -> str:
    return f" ({op.line})" if op.line else ""


def check_numbers(scope: Scope, op: Op) -> None:
    """Raises NoMatch if a number among the attributes of an element-wise op is made of sizes that
    data decide, such as the number of rows that an expert has."""
    if names_in(op) - scope.input_sizes:
        raise not_row_wise(op, "reads the number of rows")


def counting(scope: Scope, value: Value) -> Op | None:
    """The op behind `value` that makes numbers of a size that data decide, such as an arange over
    the rows of an expert; None if there is none nearby."""
    waiting, visited = [value], {value}
    while waiting and len(visited) < _LIMIT:
        op = scope.maker(waiting.pop(0))
        if op is None:
            continue
        if not op.inputs and _numbers(op) - scope.input_sizes:
            return op
        for source in op.inputs:
            if source not in visited and _counted(scope, source):
                visited.add(source)
                waiting.append(source)
    return None


def _counted(scope: Scope, value: Value) -> bool:
    """Whether the size of a value depends on data, or it is one number."""
    sizes = {name for dim in value.shape for name in symbols(dim)}
    return not value.shape or bool(sizes - scope.input_sizes)


def _numbers(op: Op) -> set[str]:
    """The named sizes in the attributes of an op, except its shape."""
    return names_in(replace(op, attrs={k: v for k, v in op.attrs.items() if k != "size"}))
