"""What a graph that is evaluated op by op needs for its gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moec.errors import UsageError
from moec.ir.graph import Op
from moec.ir.opdef import Runner


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
        raise UsageError(f"{needed}, and they cannot be computed: {line}: {advice}") from why
