"""Captures a module, and calls it with other data and sizes, to see whether one call changes the
results of another.

A value that only the first call sets may come from its data or sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.captured import Captured
from moec.capture.earlier_calls.source_lines import reads
from moec.capture.earlier_calls.two_runs import (
    EarlierCalls,
    agree,
    depends,
    differs,
    undisturbed,
)
from moec.capture.state.reach import snapshot, values_kept
from moec.capture.state.snapshot import Slot
from moec.capture.state.traced_changes import changes_noted
from moec.errors import CaptureError
from moec.ir.sizes.thresholds import nearest_allowed
from moec.oracle.agree import at_sizes, sizes_of
from moec.oracle.cases import drawn
from moec.oracle.draws import DRAWS, Draw

Tensors = Sequence[torch.Tensor]
Run = Callable[..., Any]
"""Calls the module with tensors, and returns the leaves of its result."""

_TURNS = (0, 0, 1, 0, 2, 1, 1, 2, 2, 0)
"""Numbers of three inputs, such that each of them follows each other one and itself."""


def capture_stateless(earlier: EarlierCalls, run: Callable[[], Captured]) -> Captured:
    """The capture that `run` makes of a module whose calls leave `earlier`. Afterwards the module's
    Python values are what they were.

    Raises what `run` raises, and CaptureError where a call with other data or sizes changes the
    results of later calls, or where a branch that the example does not take counts.
    """
    module = earlier.module
    with PROCESS_STATE, values_kept(module), changes_noted() as traced:
        captured = run()
    if earlier.first or traced.slots or not _is_traced(captured):
        with PROCESS_STATE:
            counts = counts_with_inputs(module, captured.eager, _inputs(captured))
        marked = {slot.place for slot in (*earlier.slots, *earlier.first)}
        others = [slot for slot in (*counts, *traced.counts) if slot.place not in marked]
        earlier = replace(earlier, slots=(*earlier.slots, *_checked(module, others)))
    again = captured.other
    return replace(
        captured,
        notes=(*captured.notes, *earlier.notes),
        eager=_without_traces(module, captured.eager),
        other=None if again is None else partial(capture_stateless, earlier, again),
    )


def counts_with_inputs(module: torch.nn.Module, run: Run, inputs: Sequence[Tensors]) -> list[Slot]:
    """The slots whose number, or whose length of a list, a second call with the same inputs
    changes.

    Each of three inputs is given to a module without earlier calls, the first twice. Where that
    changes something, a sequence of calls has each pair of inputs. Raises CaptureError where a call
    changes the results of later calls.
    """
    fresh: list[Sequence[Any] | None] = []
    writes = False
    for tensors in inputs:
        with values_kept(module):
            start = snapshot(module)
            fresh.append(_results(run, tensors))
            writes = writes or bool(start.changed(snapshot(module)))
            if not writes and len(fresh) == 1 and not _agree(fresh[0], _results(run, tensors)):
                raise differs(module)
    if not writes:
        return []
    counts, before, number = list[Slot](), -1, -1
    with values_kept(module):
        for number in _TURNS:
            start = snapshot(module)
            agrees = _agree(fresh[number], _results(run, inputs[number]))
            if number == before:
                counts += [slot for slot, _ in start.counted(snapshot(module))]
            if before >= 0 and not agrees:
                break
            before = number
        else:
            return counts
    raise _refusal(module, run, inputs[before], inputs[number])


def _checked(module: torch.nn.Module, counts: Iterable[Slot]) -> list[Slot]:
    """`counts`, each once. Raises CaptureError where code reads one: no run of the example shows
    what it does with it."""
    slots = list({slot.place: slot for slot in counts}.values())
    if reads(module, {slot.name for slot in slots}):
        raise depends(
            module,
            "its result may depend on {}, which changes from call to call",
            slots,
            "only calls with other data change it: make it an argument of the module",
        )
    return slots


def _results(run: Run, tensors: Tensors) -> Sequence[Any] | None:
    """The module's results; None where it refuses these inputs."""
    with undisturbed():
        try:
            leaves = run(*(tensor.clone() for tensor in tensors))
        except Exception:  # whatever the module raises
            return None
        # On leaving, what the run wrote is undone, also in the results.
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _agree(one: Sequence[Any] | None, other: Sequence[Any] | None) -> bool:
    """Whether two results agree; a call that is refused agrees with all."""
    return one is None or other is None or agree(one, other)


def _refusal(module: torch.nn.Module, run: Run, first: Tensors, later: Tensors) -> CaptureError:
    with values_kept(module):
        start = snapshot(module)
        _results(run, first)
        slots = start.changed(snapshot(module))
    return depends(
        module,
        "its result depends on what an earlier call left in {}",
        slots,
        f"a call with inputs of {_sizes(first)} changes the result for inputs of {_sizes(later)}",
        "compute it in every call, or fill it before the model is compiled",
    )


def _sizes(tensors: Tensors) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _without_traces(module: torch.nn.Module, run: Run) -> Run:
    """`run`, which calls the module, without what its calls leave."""

    def undone(*tensors: torch.Tensor) -> Any:
        with values_kept(module):
            return run(*tensors)

    return undone


def _is_traced(captured: Captured) -> bool:
    """Whether a trace executed all code of the module that the program is for: calls of other data
    and sizes then change what the example and the trace change."""
    return captured.way == "traced" and not captured.described


def _inputs(captured: Captured) -> list[Tensors]:
    """Inputs of more rows than the example's with large values, the example, and few rows."""
    program, example, bounds = captured.program, captured.example, captured.program.graph.bounds
    example_sizes = sizes_of(program, example)

    def sized(size_of: Callable[[int], int], draw: Draw) -> Tensors:
        sizes = {
            name: min(max(size_of(example_sizes.get(name, 2)), limits.low), limits.high or 2**31)
            for name, limits in bounds.items()
            if name.isidentifier()
        }
        return drawn(program, at_sizes(program, example, nearest_allowed(bounds, sizes)), draw)

    large, few = DRAWS[2], DRAWS[0]
    return [sized(lambda size: 2 * size + 3, large), example, sized(lambda size: 1, few)]
