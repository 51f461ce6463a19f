"""`moec run --memory`: a model within a limit of memory, and what its store did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moec.commands.output.echo import echo
from moec.errors import UsageError

if TYPE_CHECKING:
    from moec.runtime.artifact.artifact import Artifact
    from moec.runtime.call.executor import Executor
    from moec.runtime.expert_store.device import StoreReport
    from moec.runtime.expert_store.native import StoreOptions
    from moec.runtime.expert_store.slots import LayerSize, MemoryLimit
    from moec.runtime.expert_store.start import Fit


def limit_of(memory: str | None, routing: Path | None) -> int | None:
    """The bytes of --memory. Raises UsageError for what is no size, and for --routing
    without it."""
    from moec.runtime.process.byte_sizes import bytes_of

    if memory is None and routing is not None:
        raise UsageError("--routing chooses what --memory holds: give both")
    return None if memory is None else bytes_of(memory)


def start_limited(
    opened: Artifact, limit: int, trace: Path | None, routing: Path | None, texts: int
) -> Executor:
    """The model in at most `limit` bytes of memory, with the caches of so many texts.

    Raises UsageError where the limit cannot be held.
    """
    from moec.runtime.expert_store.start import TextRoom, fit_evenly, start_within

    if trace is not None:
        raise UsageError("--record-routing needs all experts in memory: leave --memory out")
    fit = fit_evenly if routing is None else _fit_to(routing)
    return start_within(opened, limit, fit, TextRoom(texts))


def _fit_to(routing: Path) -> Fit:
    """Slots and policy by a replay."""
    from moec.plan.simulation.slots_by_trace import slots_by_trace
    from moec.runtime.call.routing_trace import load_trace
    from moec.runtime.expert_store.native import StoreOptions

    trace = load_trace(routing)

    def fit(limit: MemoryLimit, layers: Sequence[LayerSize]) -> tuple[Sequence[int], StoreOptions]:
        slots, best = slots_by_trace(trace, limit, layers)
        return slots, StoreOptions(policy=best.policy, half_life=best.half_life)

    return fit


def _store_line(stored: StoreReport) -> str:
    from moec.runtime.checks import show_bytes

    counts = stored.counts
    share = counts.hits / max(1, counts.visits)
    return (
        f"{show_bytes(stored.slot_bytes)} of {show_bytes(stored.expert_bytes)} of experts in "
        f"memory: {share:.0%} of those needed were there, {show_bytes(counts.bytes_read)} were "
        f"read ({stored.reading}) in {counts.read_seconds:.1f} s, and threads waited for "
        f"{counts.stall_seconds:.1f} s"
    )


def store_answer(executor: Executor, silent: bool) -> dict[str, Any]:
    """What the store did, for --json; printed unless `silent`. Empty without a store."""
    from moec.runtime.expert_store.start import store_report

    report = store_report(executor)
    if report is None:
        return {}
    if not silent:
        echo(_store_line(report), err=True)
    return {"store": asdict(report)}
