"""Gradients inside a custom operator, where PyTorch switches autograd off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autograd_inside() -> Iterator[None]:
    """While open, operations are recorded for autograd, even inside a custom operator."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in (key.AutogradFunctionality, key.AutogradOther, key.ADInplaceOrView):
        excluded = excluded.remove(name)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
