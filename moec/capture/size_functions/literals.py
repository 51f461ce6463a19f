"""Keeps literals out of what torch computes during an export.

    t = torch.tensor(2.0) * (n / 6)
    y = x * (3 if t > 2 else 1)

torch evaluates operators on literals while it traces. It leaves out those with a symbolic integer,
but not those with a symbolic float: the branch would go as in the example, without a guard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses import fake_tensor

_TESTED = "SymInt"
"""The name in torch's file by which it tests arguments for symbolic integers."""


@contextmanager
def floats_symbolic() -> Iterator[None]:
    """While open, torch evaluates no operator that has a symbolic float among its arguments."""
    if not hasattr(fake_tensor, _TESTED):
        yield
        return
    with mock.patch.object(fake_tensor, _TESTED, (torch.SymInt, torch.SymFloat)):
        yield
