"""Numbers that a module returns, computed again with tensors.

A count that Python has read is a symbol, such as the length of a list of rows. The graph
may lose this list: recognised experts have none. So the number is computed from the tensors that
the symbols were read from.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy
import torch

from moec.capture.speculate.facts.symbols import expression, reads_data
from moec.capture.speculate.operators.hooks import Trace
from moec.torch_private import Max, Min


def hold(trace: Trace, value: Any) -> torch.Tensor | None:
    """A tensor [] of a symbolic number; None where it is computed in a way that is not repeated.

    Integers are i64, floats that were read from a tensor have its dtype.
    """
    if isinstance(value, torch.SymFloat):
        return _read(trace, expression(value))
    if not isinstance(value, torch.SymInt):
        return None
    if not reads_data(value):
        return _of_size(value)

    def computed(expr: sympy.Expr) -> torch.Tensor | None:
        tensor = _read(trace, expr)
        if tensor is not None:
            return tensor.to(torch.int64)
        if expr.is_Integer:
            return torch.full((), int(expr), dtype=torch.int64)
        size = trace.sizes.get(expr, trace.cuts.get(expr))
        if size is not None and not reads_data(size):
            return _of_size(size)
        for kind, combine in _COMBINE.items():
            if isinstance(expr, kind):
                parts = [computed(part) for part in expr.args]
                tensors = [part for part in parts if part is not None]
                return reduce(combine, tensors) if len(tensors) == len(parts) else None
        return None

    return computed(expression(value))


_COMBINE: dict[Any, Any] = {
    sympy.Add: torch.add,
    sympy.Mul: torch.mul,
    (Max, sympy.Max): torch.maximum,
    (Min, sympy.Min): torch.minimum,
}


def _of_size(size: Any) -> torch.Tensor:
    return torch.full((), size, dtype=torch.int64)


def _read(trace: Trace, expr: sympy.Expr) -> torch.Tensor | None:
    tensor = trace.readouts.get(expr)
    return None if tensor is None else tensor.reshape(())
