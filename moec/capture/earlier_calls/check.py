"""Runs a module on its example to see whether its result depends on earlier calls."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.calls.trials import Undone, quiet
from moec.capture.earlier_calls.clocks import always_changes, clocks_unread
from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue, reads
from moec.capture.python_values.reach import snapshot, values_kept
from moec.capture.python_values.slots import MISSING, Slot
from moec.capture.speculate.sites import Site
from moec.capture.user_code.sources import is_internal, is_standard
from moec.errors import CaptureError


@dataclass(frozen=True)
class EarlierCalls:
    """Where calls of a module leave values that no later call reads."""

    module: torch.nn.Module
    slots: Sequence[Slot]

    def without_traces(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which calls the module, without what its calls leave."""

        def undone(*tensors: torch.Tensor) -> Any:
            with values_kept(self.module):
                return run(*tensors)

        return undone


def earlier_calls(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> EarlierCalls:
    """The slots that every call of the module with these arguments changes.

    The module runs once, or three times where a call leaves something, and is afterwards as it
    was. Raises CaptureError, with the user's line, where the result depends on what an earlier
    call left, on a clock, or on random numbers of Python or NumPy; and where the first call
    computes something else than the second. A module that fails on its example is left to the
    capture.
    """
    runs = _Runs(ModuleCall(module, args, kwargs), Decisions())
    with PROCESS_STATE:
        before = snapshot(module)
        seeds = random.getstate(), np.random.get_state()
        try:
            with clocks_unread(runs.decisions):
                return EarlierCalls(module, _changing(runs))
        except _Refused as why:
            raise CaptureError(f"{type(module).__name__} cannot be captured: {why}") from None
        finally:
            before.restore(snapshot(module))
            random.setstate(seeds[0])
            np.random.set_state(seeds[1])


class _Refused(Exception):
    """The result depends on earlier calls; the message has the reason and the line."""


@dataclass(frozen=True)
class _Runs:
    """Runs of a call; its branches on values of earlier calls go as `decisions` say."""

    example: ModuleCall
    decisions: Decisions

    @property
    def module(self) -> torch.nn.Module:
        return self.example.module

    def leaves(self, answers: Mapping[Site, bool]) -> list[Any]:
        """The leaves of the result and the buffers after the run, which the run leaves as they
        were. Raises _Refused where it reads a value of an earlier call."""
        self.decisions.start(answers)
        try:
            return _run(self.example)
        except CaptureError as why:
            raise _Refused(str(why)) from None

    def mark(self, slots: Sequence[Slot]) -> None:
        """Puts an EarlierValue into each slot; one value that is in several slots stays one."""
        held = {key: value for key, (_, value) in snapshot(self.module).values.items()}
        values: dict[int, EarlierValue] = {}
        for slot in slots:
            value = held.get((id(slot.owner), slot.key), MISSING)
            if value is not MISSING and type(value) is not EarlierValue:
                new = EarlierValue(value, slot.words, self.decisions)
                slot.put(values.setdefault(id(value), new))


def _changing(runs: _Runs) -> list[Slot]:
    module = runs.module
    start = snapshot(module)
    runs.mark([slot for slot, value in start.values.values() if always_changes(value)])
    start = snapshot(module)
    try:
        first = runs.leaves({})
    except _Refused:
        raise
    except Exception:  # the module's own error, which the capture reports
        return []
    met = dict(runs.decisions.met)
    after_first = snapshot(module)
    changed = start.changed(after_first)
    if not changed and not met:
        return []
    try:
        second = runs.leaves({})
    except _Refused:
        raise
    except Exception:  # it runs once only
        return []
    changing = after_first.changed(snapshot(module))
    runs.mark(changing)
    _refuse_decisions(runs, changing)
    if not _equal(first, second):
        raise _Refused(
            "its first call computes something else than its second\n"
            f"  the first call changes {_words(changed)}\n"
            "  call the module once before it is compiled"
        )
    return changing


def _refuse_decisions(runs: _Runs, changing: Sequence[Slot]) -> None:
    """Raises _Refused where a branch on values of earlier calls changes the result, or something
    besides `changing` that stays."""
    start = snapshot(runs.module)
    changing_keys = {(id(slot.owner), slot.key) for slot in changing}

    def leaves(answers: Mapping[Site, bool]) -> tuple[list[Any], set[Any]]:
        try:
            result = runs.leaves(answers)
            slots = start.changed(snapshot(runs.module))
            return result, {(id(slot.owner), slot.key) for slot in slots} - changing_keys
        finally:
            start.restore(snapshot(runs.module))

    try:
        usual, written = leaves({})
    except _Refused:
        raise
    except Exception as error:  # no code of torch or Python takes an EarlierValue for a number
        raise _Refused(str(reads(_words(changing), _last_of_user(error)))) from None
    pending, tried = dict(runs.decisions.met), set[Site]()
    while pending:
        site, (answer, source) = pending.popitem()
        if site in tried:
            continue
        tried.add(site)
        try:
            other, written_then = leaves({site: not answer})
        except _Refused:
            raise
        except Exception:
            raise _Refused(str(reads(source, site))) from None
        if not _equal(usual, other) or written_then - written:
            raise _Refused(str(reads(source, site)))
        pending |= {s: met for s, met in runs.decisions.met.items() if s not in tried}


def _words(slots: Sequence[Slot]) -> str:
    return " and ".join(slot.words for slot in slots[:2])


def _last_of_user(error: Exception) -> Site | None:
    """The user's innermost line in the traceback of an error."""
    site, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not (is_internal(file) or is_standard(file)):
            site = Site(trace.tb_frame.f_code, trace.tb_lasti)
        trace = trace.tb_next
    return site


def _run(example: ModuleCall) -> list[Any]:
    """The leaves of the module's result. What the run writes into tensors is undone."""
    buffers = _buffers_kept(example.module)
    with torch.no_grad(), warnings.catch_warnings(), quiet(), buffers, Undone():
        warnings.simplefilter("ignore")
        result = example(*[tensor.clone() for tensor in example.tensors])
        leaves = [*pytree.tree_leaves(result), *example.module.buffers()]
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


@contextmanager
def _buffers_kept(module: torch.nn.Module) -> Iterator[None]:
    """On leaving, each buffer is the tensor that it was on entering."""
    before = [(part, dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, buffers in before:
            part._buffers.clear()
            part._buffers.update(buffers)


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            if one.shape != other.shape or not torch.allclose(
                one.float(), other.float(), equal_nan=True
            ):
                return False
    return True
