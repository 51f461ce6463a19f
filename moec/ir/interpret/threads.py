"""The number of threads that PyTorch uses for small models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moec.errors import SetupError
from moec.ir.graph import Op
from moec.ir.opdef import Runner

SMALL = 1 << 24
"""With fewer elements of weights, one core is faster than several."""


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """PyTorch with one thread if the weights that it reads have few elements.

    A small op ends before a second thread has woken up; on a busy machine, each op would wait until
    that thread gets a core.
    """
    before = torch.get_num_threads()
    if before == 1 or elements >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def copied(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Tensor:
    """aten.copy, for which torch has no derivative."""
    like, x = tensors
    return x.to(like.dtype).expand(like.shape)


@contextmanager
def gradients_needed(needed: str, advice: str) -> Iterator[None]:
    """Raises UsageError, with what is `needed` and what to do instead, where torch cannot compute
    a gradient."""
    try:
        yield
    except RuntimeError as why:
        line = str(why).partition("\n")[0]
        raise SetupError(f"{needed}, and they cannot be computed: {line}: {advice}") from why
