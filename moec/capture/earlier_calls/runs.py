"""Runs of a module's call, each from the same random numbers, that leave tensors as they were."""

from __future__ import annotations

import dis
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.trials import Undone, quiet
from moec.capture.earlier_calls.clocks import watched_value
from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue, reads
from moec.capture.python_values.parts import Path, with_parts
from moec.capture.python_values.reach import snapshot
from moec.capture.python_values.slots import MISSING, Slot
from moec.capture.speculate.sites import Site
from moec.capture.user_code.sources import is_internal, is_standard
from moec.errors import CaptureError


class Refused(Exception):
    """The result depends on earlier calls; the message has the reason and the line."""


@dataclass(frozen=True)
class Runs:
    """Runs of a call; its branches on values of earlier calls go as `decisions` say."""

    example: ModuleCall
    decisions: Decisions

    @property
    def module(self) -> torch.nn.Module:
        return self.example.module

    def leaves(self, answers: Mapping[Site, bool]) -> list[Any]:
        """The leaves of the result and the buffers after the run, which the run leaves as they
        were. Raises Refused where it reads a value of an earlier call."""
        self.decisions.start(answers)
        try:
            return _run(self.example)
        except CaptureError as why:
            raise Refused(str(why)) from None


def mark(module: torch.nn.Module, slots: Sequence[Slot], decisions: Decisions) -> None:
    """Puts an EarlierValue into each slot that is filled, or into the parts of its value that are
    meant; one value in several slots stays one."""
    held = {key: value for key, (_, value) in snapshot(module).values.items()}
    paths: dict[tuple[int, Any], list[Path]] = {}
    for slot in slots:
        paths.setdefault(slot.place, []).extend(slot.paths)
    values: dict[int, Any] = {}

    def watched(value: Any, words: str) -> Any:
        if type(value) is EarlierValue:
            return value
        return values.setdefault(id(value), watched_value(value, words, decisions))

    for slot in slots:
        value = held.get(slot.place, MISSING)
        if value is not MISSING:
            slot.put(with_parts(value, paths[slot.place], slot.words, watched))


def agree(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether the tensors among two results are the same, up to rounding: the sums of a matrix
    product may round by the addresses of its operands, in proportion to its largest values."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            if one.shape != other.shape or one.dtype != other.dtype:
                return False
            if not _close(_real(one), _real(other)):
                return False
    return True


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    finite = one[one.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6 * largest + 1e-8, equal_nan=True)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.float()


def words_of(slots: Sequence[Slot]) -> str:
    return " and ".join(slot.words for slot in slots[:2])


def last_of_user(error: Exception) -> Site | None:
    """The user's innermost line in the traceback of an error."""
    site, trace = None, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not (is_internal(file) or is_standard(file)):
            site = Site(trace.tb_frame.f_code, trace.tb_lasti)
        trace = trace.tb_next
    return site


@contextmanager
def undisturbed() -> Iterator[None]:
    """While open, a run draws the same random numbers as any other, and prints nothing. What it
    writes into tensors is undone."""
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        quiet(),
        Undone(),
    ):
        warnings.simplefilter("ignore")
        yield


def _run(example: ModuleCall) -> list[Any]:
    """The leaves of the module's result. Raises CaptureError where it returns an EarlierValue."""
    with _buffers_kept(example.module), undisturbed():
        result = example(*[tensor.clone() for tensor in example.tensors])
        leaves = pytree.tree_leaves(result)
        for leaf in leaves:
            if type(leaf) is EarlierValue:
                raise reads(leaf._source, _return(example.module))
        leaves += example.module.buffers()
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _return(module: torch.nn.Module) -> Site | None:
    """The last `return` of a module's forward."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None:
        return None
    ends = [step.offset for step in dis.get_instructions(code) if "RETURN" in step.opname]
    return Site(code, ends[-1])


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
