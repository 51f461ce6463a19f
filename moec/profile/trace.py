"""A profile as a trace in Chrome's format, which Perfetto (ui.perfetto.dev) and chrome://tracing
open: the calls of the last round, the library's function in each, and the kernels in that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moec.profile.data import KernelLine, PhaseProfile, ProfileData
from moec.profile.record import TimedPhase
from moec.runtime.call.profile import SHAPES, TimedCall

PROCESS = THREAD = 1


def trace(profile: ProfileData, recorded: Sequence[TimedPhase]) -> dict[str, Any]:
    """The trace as JSON-compatible dicts and lists. Times are in microseconds from the first."""
    calls = [
        (phase, call)
        for phase, timed in zip(profile.phases, recorded, strict=True)
        for run in timed.timed[-len(timed.watched) :]
        for call in run
    ]
    first = min(call.start for _, call in calls)
    events = [_name("process_name", profile.model), _name("thread_name", "kernels")]
    for phase, call in calls:
        events += _slices(phase, call, first)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _name(kind: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": PROCESS, "tid": THREAD, "args": {"name": name}}


def _slices(phase: PhaseProfile, call: TimedCall, first: int) -> Iterator[dict[str, Any]]:
    """Slices that contain those after them; times are from `first` on, in nanoseconds."""
    starts, ends = (call.spans.T - first).tolist()
    yield _slice(phase.name, "call", call.start - first, call.end - first, dict(call.sizes))
    yield _slice(phase.function, "function", starts[0], ends[0], {})
    lines = iter(phase.kernels)
    for symbol, start, end in zip(call.kernels, starts[1:], ends[1:], strict=True):
        if symbol.startswith(SHAPES):
            yield _slice(symbol, "sizes", start, end, {})
        else:
            line = next(lines)
            yield _slice(line.kernel, line.layer, start, end, _arguments(line))


def _arguments(line: KernelLine) -> dict[str, Any]:
    texts = {"module": line.module, "line": line.line, "symbol": line.symbol}
    return texts | {"ops": ", ".join(line.ops), "flops": line.flops, "bytes": line.bytes}


def _slice(
    name: str, category: str, start: int, end: int, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
        "pid": PROCESS,
        "tid": THREAD,
        "args": {key: value for key, value in arguments.items() if value is not None},
    }
