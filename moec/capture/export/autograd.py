"""Gradients inside a custom operator, where PyTorch switches autograd off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moec.torch_private import DispatchKey, ForceDispatchKeyGuard, excluded_keys, included_keys


@contextmanager
def autograd_inside() -> Iterator[None]:
    """While open, operations are recorded for autograd, even inside a custom operator."""
    key = DispatchKey
    excluded = excluded_keys()
    for name in (key.AutogradFunctionality, key.AutogradOther, key.ADInplaceOrView):
        excluded = excluded.remove(name)
    included = included_keys()
    with ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
