"""Properties of torch's symbolic numbers."""

from __future__ import annotations

from typing import Any, TypeGuard

import sympy
import torch

from moec.torch_private import free_unbacked_symbols

Number = int | torch.SymInt
Real = int | float | torch.SymInt | torch.SymFloat


def is_symbolic(value: Any) -> TypeGuard[torch.SymInt | torch.SymFloat]:
    return isinstance(value, torch.SymInt | torch.SymFloat)


def reads_data(value: Any) -> bool:
    """Whether a number depends on data, and not only on sizes of the inputs."""
    return is_symbolic(value) and bool(free_unbacked_symbols(value))


def expression(value: Any) -> Any:
    """A number as a sympy expression; equal numbers have equal expressions."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.expr
    return sympy.sympify(value)
