"""Runs a module on its example, again, and again from the start, to see whether its result depends
on earlier calls."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.modules.lazy import LazyModuleMixin

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.calls.trials import Undone, quiet
from moec.capture.earlier_calls.source_lines import clocks, reads
from moec.capture.state.reach import snapshot
from moec.capture.state.snapshot import CONSTANTS, Slot, Snapshot
from moec.errors import CaptureError
from moec.oracle.tolerance import are_close
from moec.torch_private import buffers_of, pytree

_CHANGES = "its result depends on {}, which changes from call to call"
_ARGUMENT = (
    "a compiled model computes the same in every call",
    "make it an argument of the module, or read it only where the module is training",
)


@dataclass(frozen=True)
class EarlierCalls:
    """What calls of a module leave, and no result depends on: `slots` change with every call, those
    of `first` with the first call."""

    module: torch.nn.Module
    slots: Sequence[Slot] = ()
    first: Sequence[Slot] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the report: what the module's calls set and the compiled ones do not, and lines
        whose values are those of the capture."""
        names = [slot.words for slot in self.slots if not slot.words.endswith("]")]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        unset = (
            f"calls of the compiled model do not set {', '.join(names[:4])}{more}; "
            "capture ran the module, and put them back"
        )
        lines = [*reads(self.module, {slot.name for slot in self.slots}), *clocks(self.module)]
        constant = (f"{line} has the value of the capture in every call" for line in lines)
        return (*((unset,) if names else ()), *dict.fromkeys(constant))


def earlier_calls(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> EarlierCalls:
    """The slots that calls of the module with these arguments change.

    The module runs twice, and up to four times where a call leaves something, and is afterwards as
    it was. Raises CaptureError where the result depends on what an earlier call left, or on random
    numbers of Python or NumPy; and where the first call computes something else than the second. A
    module that fails on its example is left to the capture.
    """
    example = ModuleCall(module, args, kwargs)
    with PROCESS_STATE:
        _initialise(example)
        start, seeds = snapshot(module), (random.getstate(), np.random.get_state())
        try:
            return _judged(example, start)
        finally:
            start.restore(snapshot(module))
            random.setstate(seeds[0])
            np.random.set_state(seeds[1])


def _initialise(example: ModuleCall) -> None:
    """Calls a module with lazy parameters once: the first call gives them shapes and values, which
    stay, as in eager."""
    lazy = [part for part in example.modules() if isinstance(part, LazyModuleMixin)]
    if not any(part.has_uninitialized_params() for part in lazy):
        return
    with torch.no_grad(), suppress(Exception), quiet():  # the capture reports why it fails
        example(*example.tensors)


def _judged(example: ModuleCall, start: Snapshot) -> EarlierCalls:
    module = example.module
    first = _leaves(example)
    once = snapshot(module)
    parts = start.new_parts(once)
    if parts:
        raise refusal(
            module,
            f"its first call creates {parts[0]}, whose values a compiled model cannot know",
            [],
            "call the module once before it is compiled, or create it in __init__",
        )
    changed = start.changed(once)
    second = None if first is None else _leaves(example)
    if second is None:  # it fails, or runs once only
        return EarlierCalls(module, first=changed)
    twice = snapshot(module)
    changing = once.changed(twice)
    if not agree(first, second):
        start.restore(twice)
        if not agree(first, _leaves(example)):
            raise differs(module)
        if changing:
            raise depends(module, _CHANGES, changing, *_ARGUMENT)
        raise depends(
            module,
            "its first call computes something else than its second: it sets {}",
            changed,
            "call the module once before it is compiled",
        )
    counts = once.counted(twice)
    if counts:
        for slot, far in counts:
            slot.put(far)
        if not agree(first, _leaves(example)):
            raise depends(module, _CHANGES, [slot for slot, _ in counts], *_ARGUMENT)
    return EarlierCalls(module, changing, changed)


def _leaves(example: ModuleCall) -> list[Any] | None:
    """The leaves of the module's result and its buffers, which the run leaves as they were; None
    where the module fails."""
    with _buffers_kept(example.module), undisturbed():
        try:
            result = example(*[tensor.clone() for tensor in example.tensors])
        except Exception:  # the module's own error, which the capture reports
            return None
        leaves = [*pytree.tree_leaves(result), *example.module.buffers()]
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


@contextmanager
def _buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """On leaving, each buffer is the tensor that it was on entering."""
    before = [(part, dict(buffers_of(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, buffers in before:
            buffers_of(part).clear()
            buffers_of(part).update(buffers)


@contextmanager
def undisturbed() -> Iterator[None]:
    """While open, a run draws the same random numbers of torch as any other, and prints nothing.
    What it writes into tensors is undone."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        quiet(),
        Undone(),
    ):
        warnings.simplefilter("ignore")
        yield


def agree(first: Sequence[Any] | None, second: Sequence[Any] | None) -> bool:
    """Whether two results are the same, up to rounding."""
    if first is None or second is None or len(first) != len(second):
        return False
    return all(map(_agree, first, second))


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return are_close(one, other)  # sums round by the addresses of their operands
    return not isinstance(one, CONSTANTS) or repr(one) == repr(other)


def refusal(
    module: torch.nn.Module, why: str, lines: Sequence[str], *remedies: str
) -> CaptureError:
    name = type(module).__name__
    first = [f"{lines[0]} reads it"] if lines else []
    return CaptureError("\n  ".join([f"{name} cannot be captured: {why}", *first, *remedies]))


def differs(module: torch.nn.Module) -> CaptureError:
    return refusal(
        module,
        "two calls with the same inputs give different results",
        clocks(module),
        "a compiled model computes the same in every call: remove what draws numbers or reads a "
        "clock",
    )


def depends(
    module: torch.nn.Module, why: str, slots: Sequence[Slot], *remedies: str
) -> CaptureError:
    """A refusal that names the first of `slots`, those that code reads before others, in place of
    {} in `why`."""
    lines = [reads(module, {slot.name}) for slot in slots]
    read = [slot for slot, of_slot in zip(slots, lines, strict=True) if of_slot] or slots
    words = " and ".join(slot.words for slot in read[:2]) or "a value that moec does not find"
    return refusal(
        module, why.format(words), [line for of_slot in lines for line in of_slot], *remedies
    )
