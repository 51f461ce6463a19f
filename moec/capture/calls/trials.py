"""Runs a module on tensors of other lengths, to learn whether it accepts them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.state.reach import values_kept
from moec.torch_private import TorchDispatchMode, schema_of

_SIZES_LOG = logging.getLogger("torch.fx.experimental.symbolic_shapes")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the standard streams and torch's log of symbolic sizes. Where torch.export fails, it
    prints the whole graph and logs the numbers whose lines it does not know; its exception has the
    reason."""
    with PROCESS_STATE:
        disabled = _SIZES_LOG.disabled
        _SIZES_LOG.disabled = True
        try:
            with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
                yield
        finally:
            _SIZES_LOG.disabled = disabled


@dataclass
class Trials:
    """Runs of a call on given tensors; each combination of shapes is run once.

    A run changes no tensor and no attribute: caches and counters of the module are restored.
    """

    call: ModuleCall
    answers: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def runs(self, tensors: Sequence[torch.Tensor]) -> bool:
        lengths = tuple(tensor.shape for tensor in tensors)
        if lengths not in self.answers:
            padded = _padded(tensors) if self.takes_padding else None
            self.answers[lengths] = self._run(tensors) and (padded is None or self._run(padded))
        return self.answers[lengths]

    @cached_property
    def takes_padding(self) -> bool:
        """Whether the call runs with one token masked. Some modules skip masks of ones, and would
        then appear to accept a mask of any shape."""
        padded = _padded(self.call.tensors)
        return padded is not None and self._run(padded)

    def _run(self, tensors: Sequence[torch.Tensor]) -> bool:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            quiet(),
            values_kept(self.call),
            Undone(),
        ):
            warnings.simplefilter("ignore")
            try:
                self.call(*tensors)
            except Exception:  # whatever the module raises, it refuses these lengths
                return False
        return True


def _padded(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    """The tensors with a zero at the end of the last axis of each mask; None where there is no
    mask. A mask is a tensor of integers or booleans that are all 1."""
    masks = [
        t.dim() > 0 and t.numel() > 0 and not t.is_floating_point() and bool((t == 1).all())
        for t in tensors
    ]
    if not any(masks):
        return None
    padded = [t.clone() if is_mask else t for t, is_mask in zip(tensors, masks, strict=True)]
    for tensor, is_mask in zip(padded, masks, strict=True):
        if is_mask:
            tensor[..., -1] = 0
    return tuple(padded)


class Undone(TorchDispatchMode):  # type: ignore[misc]
    """Copies each storage before an operator writes into it, and restores all on leaving, except
    those that were allocated while open: a call may fill a table and keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Any, Any]] = {}
        self.allocated: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_sizes(func, args, kwargs)
        for position, name in _written(func):
            written = args[position] if position < len(args) else kwargs.get(name)
            for tensor in written if isinstance(written, list | tuple) else [written]:
                if isinstance(tensor, torch.Tensor):
                    storage: Any = tensor.untyped_storage()
                    if storage.data_ptr() not in self.allocated:
                        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        operands = () if func in _OF_PYTHON else _addresses(args, kwargs)
        self.allocated |= {*_addresses(result)}.difference(operands)
        return result

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        for storage, copy in self.before.values():
            if storage.nbytes() == copy.nbytes():
                storage.copy_(copy)


_OF_PYTHON = (torch.ops.aten.lift_fresh.default,)
"""Operators whose operand was just made of Python numbers."""


def _check_sizes(func: Any, args: Any, kwargs: Any) -> None:
    """Raises IndexError for sizes at which torch's kernel would leave its tensors."""
    name, fits = schema_of(func).name, True
    if "batch_norm" in name and "backward" not in name:
        rows = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, torch.Tensor)]
        fits = all(row.numel() == args[0].shape[1] for row in rows)
    elif name == "aten::lu_unpack":
        *batch, height, width = args[0].shape
        fits = [*args[1].shape] == [*batch, min(height, width)]
    if not fits:
        raise IndexError(f"{name} does not check its sizes")


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that an operator writes into."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema_of(func).arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _addresses(*values: Any) -> Iterator[int]:
    """The addresses of the storages of all tensors in arguments or results of an operator."""
    for value in values:
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            yield value.untyped_storage().data_ptr()
        elif isinstance(value, list | tuple):
            yield from _addresses(*value)
        elif isinstance(value, dict):
            yield from _addresses(*value.values())
