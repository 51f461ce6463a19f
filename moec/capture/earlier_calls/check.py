"""Runs a module on its example to see whether its result depends on earlier calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.modules.lazy import LazyModuleMixin

from moec.capture.calls.call import ModuleCall
from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.calls.trials import quiet
from moec.capture.earlier_calls.clocks import always_changes, clocks_unread
from moec.capture.earlier_calls.earlier_value import Decisions, EarlierRead, reads
from moec.capture.earlier_calls.parting import parting
from moec.capture.earlier_calls.runs import Refused, Runs, agree, last_of_user, mark, words_of
from moec.capture.python_values.reach import snapshot, values_kept
from moec.capture.python_values.slots import Slot, Snapshot
from moec.capture.speculate.sites import Site
from moec.errors import CaptureError


@dataclass(frozen=True)
class EarlierCalls:
    """Where calls of a module leave values that no later call reads: `slots` change with every
    call, those of `first` with the first call, and `sources`, such as iterators and clocks, when
    they are read. `answers` are those of the branches on such values, which change nothing but
    `slots`."""

    module: torch.nn.Module
    slots: Sequence[Slot] = ()
    first: Sequence[Slot] = ()
    sources: Sequence[Slot] = ()
    answers: Mapping[Site, bool] = field(default_factory=dict)

    @contextmanager
    def unread(self) -> Iterator[None]:
        """While open, code of the module that reads such a value raises CaptureError with the
        line, also in branches that the example does not take. On leaving, the module's Python
        values are what they were."""
        decisions = Decisions()
        decisions.start(self.answers, only=True)
        with PROCESS_STATE, values_kept(self.module), clocks_unread(self.module, decisions):
            mark(self.module, [*self.sources, *self.slots], decisions)
            try:
                yield
            except CaptureError as error:
                read = _read(error)
                if read is None:
                    raise
                raise CaptureError(_refusal(self.module, read)) from None

    def unknown(self, slots: Sequence[Slot], others: Sequence[Slot] = ()) -> list[Slot]:
        """Those of `slots`, each once, that are not `others` and of which no call was known to
        change them."""
        marked = (*self.slots, *self.sources, *others)
        named = {(slot.place, slot.paths): slot for slot in slots}
        return [slot for slot in named.values() if not slot.belongs_to(marked)]

    def with_slots(self, slots: Sequence[Slot]) -> EarlierCalls:
        return replace(self, slots=[*self.slots, *slots])

    def without_traces(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, which calls the module, without what its calls leave."""

        def undone(*tensors: torch.Tensor) -> Any:
            with values_kept(self.module):
                return run(*tensors)

        return undone

    @property
    def notes(self) -> tuple[str, ...]:
        """A note for the report about what the module's calls set and the compiled ones do not."""
        names = [slot.words for slot in self.slots if slot.kind != "item"]
        if not names:
            return ()
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        listed = f"{', '.join(names[:4])}{more}"
        return (
            f"calls of the compiled model do not set {listed}; "
            "capture ran the module, and put them back",
        )


def _read(error: BaseException | None) -> EarlierRead | None:
    """The EarlierRead that led to an error, if one did."""
    while error is not None and not isinstance(error, EarlierRead):
        error = error.__cause__
    return error


def earlier_calls(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> EarlierCalls:
    """The slots that every call of the module with these arguments changes.

    The module runs once, or three times where a call leaves something, and is afterwards as it
    was. Raises CaptureError, with the user's line, where the result depends on what an earlier
    call left, on a clock, an id or the environment, or on random numbers of Python or NumPy; and
    where the first call computes something else than the second. A module that fails on its example
    is left to the capture.
    """
    runs = Runs(ModuleCall(module, args, kwargs), Decisions())
    with PROCESS_STATE:
        _initialise(runs.example)
        before = snapshot(module)
        seeds = random.getstate(), np.random.get_state()
        try:
            with clocks_unread(module, runs.decisions):
                return _examined(runs)
        except _Failed as failed:
            before.restore(snapshot(module))
            if runs.decisions.latest and _runs(runs):
                why = reads(runs.decisions.latest, last_of_user(failed.error))
                raise CaptureError(_refusal(module, why)) from None
            return EarlierCalls(module)
        except Refused as why:
            raise CaptureError(_refusal(module, why)) from None
        finally:
            before.restore(snapshot(module))
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


def _refusal(module: torch.nn.Module, why: Exception) -> str:
    return f"{type(module).__name__} cannot be captured: {why}"


@dataclass
class _Failed(Exception):
    """The module raised `error`, perhaps because it met a value that may not be read."""

    error: Exception


def _runs(runs: Runs) -> bool:
    try:
        runs.leaves({})
    except Exception:  # the module's own error, which the capture reports
        return False
    return True


def _examined(runs: Runs) -> EarlierCalls:
    module = runs.module
    start = snapshot(module)
    always = [slot for slot, value in start.values.values() if always_changes(value)]
    mark(module, always, runs.decisions)
    start = snapshot(module)
    first = _leaves(runs)
    met = dict(runs.decisions.met)
    after_first = snapshot(module)
    _refuse_new_parts(start, after_first)
    changed = start.changed(after_first)
    absent = bool(runs.decisions.absent)
    if not changed and not met and not absent:
        return EarlierCalls(module, sources=always)
    try:
        second = runs.leaves({})
    except Refused:
        raise
    except Exception:  # it runs once only
        return EarlierCalls(module, first=changed, sources=always)
    changing = after_first.changed(snapshot(module))
    mark(module, changing, runs.decisions)
    runs.decisions.unset = absent
    answers = _refuse_decisions(runs, changing, second)
    runs.decisions.unset = False
    if not agree(first, second):
        raise Refused(_first_differs(runs, start, changed))
    return EarlierCalls(module, changing, changed, always, answers)


def _leaves(runs: Runs) -> list[Any]:
    try:
        return runs.leaves({})
    except Refused:
        raise
    except Exception as error:
        raise _Failed(error) from None


def _refuse_new_parts(start: Snapshot, later: Snapshot) -> None:
    parts = start.new_parts(later)
    if parts:
        raise Refused(
            f"its first call creates {parts[0]}, whose values a compiled model cannot know\n"
            "  call the module once before it is compiled, or create it in __init__"
        )


def _first_differs(runs: Runs, start: Snapshot, changed: Sequence[Slot]) -> str:
    start.restore(snapshot(runs.module))
    site = parting(lambda: runs.leaves({}), lambda: None)
    lines = ["its first call computes something else than its second"]
    if site is not None:
        lines.append(f"  {site}: `{site.text}` decides it")
    lines += [
        f"  the first call changes {words_of(changed)}",
        "  call the module once before it is compiled",
    ]
    return "\n".join(lines)


def _refuse_decisions(
    runs: Runs, changing: Sequence[Slot], unmarked: Sequence[Any]
) -> dict[Site, bool]:
    """The answers of the usual run. Raises Refused where a branch on values of earlier calls, or
    a text of them, changes the result, or something besides `changing` that stays. `unmarked` is
    the result with plain values."""
    decisions = runs.decisions
    try:
        usual, written = _leaves_and_writes(runs, changing)
    except Refused:
        raise
    except Exception as error:  # no code of torch or Python takes an EarlierValue for a number
        source = words_of(changing) or decisions.latest
        raise Refused(str(reads(source, last_of_user(error)))) from None
    if decisions.absent and not agree(unmarked, usual):
        name, site = next(iter(decisions.absent.items()))
        raise Refused(str(reads(name, site)))
    texts, answers = dict(decisions.texts), {s: answer for s, (answer, _) in decisions.met.items()}
    pending, tried = dict(decisions.met), set[Site]()
    while pending:
        site, (answer, source) = pending.popitem()
        if site in tried:
            continue
        tried.add(site)
        try:
            other, written_then = _leaves_and_writes(runs, changing, {site: not answer})
        except Refused:
            raise
        except Exception:
            raise Refused(str(reads(source, site))) from None
        if not agree(usual, other) or written_then - written:
            raise Refused(str(reads(source, site)))
        pending |= {s: met for s, met in decisions.met.items() if s not in tried}
    _refuse_texts(runs, changing, usual, texts)
    return answers


def _leaves_and_writes(
    runs: Runs, changing: Sequence[Slot], answers: Mapping[Site, bool] | None = None
) -> tuple[list[Any], set[Any]]:
    """The leaves of a run, which is undone, and the places besides `changing` that it changes."""
    start = snapshot(runs.module)
    try:
        result = runs.leaves(answers or {})
        slots = start.changed(snapshot(runs.module))
        return result, {slot.place for slot in slots if not slot.belongs_to(changing)}
    finally:
        start.restore(snapshot(runs.module))


def _refuse_texts(
    runs: Runs, changing: Sequence[Slot], usual: Sequence[Any], texts: Mapping[Site, str]
) -> None:
    """Raises Refused where the result is another if texts of such values show other values."""
    for sites in (list(texts), *([site] for site in texts)) if texts else ():
        runs.decisions.changed_texts = frozenset(sites)
        try:
            same = agree(usual, _leaves_and_writes(runs, changing)[0])
        except Refused:
            raise
        except Exception:
            same = False
        finally:
            runs.decisions.changed_texts = frozenset()
        if same and len(sites) == len(texts):
            return
        if not same and len(sites) == 1:
            raise Refused(str(reads(texts[sites[0]], sites[0])))
    if texts:
        site, source = next(iter(texts.items()))
        raise Refused(str(reads(source, site)))
