"""math.sqrt of symbolic sizes, which would otherwise fix a size at the example's.

math.floor, ceil and trunc need no help: they call methods of their argument. torch exports no
logarithms of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

_PLAIN = math.sqrt


def _sqrt(x: Any) -> Any:
    return torch.sym_sqrt(x) if isinstance(x, torch.SymInt | torch.SymFloat) else _PLAIN(x)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {"sqrt": _sqrt}


def replaced_in(names: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Replacements for functions of `math` that globals hold by name (`from math import sqrt`)."""
    return {name: _sqrt for name, value in names.items() if value is _PLAIN}
