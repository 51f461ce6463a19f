"""Captures a module so that its program depends on no earlier call, also in branches that the
example does not take, and with other data and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from moec.capture.calls.process_state import PROCESS_STATE
from moec.capture.captured import Captured
from moec.capture.earlier_calls.check import EarlierCalls
from moec.capture.earlier_calls.histories import Tensors, changing_with_inputs
from moec.capture.python_values.traced_changes import changes_noted
from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import nearest_allowed
from moec.oracle.agree import at_sizes
from moec.oracle.cases import drawn
from moec.oracle.draws import DRAWS

_MOST_CAPTURES = 3
"""How often a module is captured where calls with other data change more of its values."""


def capture_unread(earlier: EarlierCalls, run: Callable[[], Captured]) -> Captured:
    """The capture that `run` makes, in which the module reads no value of an earlier call.

    Raises what `run` raises, and CaptureError, with the user's line, where it reads such a value,
    or where a call with other data or sizes changes the results of later calls.
    """
    for _ in range(_MOST_CAPTURES):
        with earlier.unread(), changes_noted() as traced:
            captured = run()
        if not (earlier.first or traced.slots) and _is_traced(captured):
            break
        with PROCESS_STATE:
            changing = changing_with_inputs(earlier, captured.eager, _inputs(captured))
        slots = earlier.unknown(changing) or earlier.unknown(traced.counts, earlier.first)
        if not slots:
            break
        earlier = earlier.with_slots(slots)
    again = captured.other
    return replace(
        captured,
        notes=(*captured.notes, *earlier.notes),
        eager=earlier.without_traces(captured.eager),
        other=None if again is None else partial(capture_unread, earlier, again),
    )


def _is_traced(captured: Captured) -> bool:
    """Whether a trace executed all code of the module that the program is for: calls of other data
    and sizes then change what the example and the trace change."""
    return captured.way == "traced" and not captured.described


def _inputs(captured: Captured) -> list[Tensors]:
    """Inputs of more rows than the example's with large values, the example, and few rows."""
    program, graph = captured.program, captured.program.graph

    def sized(choose: Callable[[str, Bounds], int], scale: float) -> Tensors:
        wished = {name: choose(name, b) for name, b in graph.bounds.items() if name.isidentifier()}
        sizes = nearest_allowed(graph.bounds, wished)
        example = at_sizes(program, captured.example, sizes)
        case = drawn(program, example, DRAWS[0])
        return [t * scale if t.is_floating_point() else t for t in case]

    now: Mapping[str, int] = {
        str(dim): tensor.shape[axis]
        for value, tensor in zip(graph.inputs, captured.example, strict=False)
        for axis, dim in enumerate(value.shape)
    }

    def more(name: str, bounds: Bounds) -> int:
        size = 2 * now.get(name, 2) + 3
        return size if bounds.high is None else max(bounds.low, min(bounds.high, size))

    def least(name: str, bounds: Bounds) -> int:
        return max(bounds.low, 1)

    return [sized(more, 30.0), captured.example, sized(least, -1.0)]
