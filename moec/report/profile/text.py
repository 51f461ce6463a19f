"""A profile as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moec.report.profile.data import KernelLine, PhaseProfile, ProfileData, Time
from moec.report.units import count, counted, size

MOST = 10
"""Calls of kernels that are listed one by one."""


def lines(profile: ProfileData) -> Iterator[str]:
    limits = profile.limits
    yield f"{profile.model}, {counted(profile.threads, 'thread')}, {profile.machine}"
    yield (
        f"measured peak {limits.peak / 1e9:.0f} GFLOP/s in {limits.dtype}, bandwidth "
        f"{limits.bandwidth / 1e9:.1f} GB/s"
    )
    for phase in profile.phases:
        yield ""
        yield from _phase(phase)


def _phase(phase: PhaseProfile) -> Iterator[str]:
    sizes = ", ".join(f"{name} = {value}" for name, value in phase.sizes.items())
    yield (
        f"{phase.name}: {time(phase.call)}, {counted(phase.repetitions, 'repetition')}, {sizes}; "
        f"{phase.overhead:+.1%} by the clock"
    )
    total = phase.call.seconds
    rows = [_row(line.kernel, line, total) for line in _by_time(phase.kinds)]
    for name, rest in (
        ("between kernels", phase.between),
        ("outside of the library", phase.outside),
    ):
        rows.append([name, "", time(rest), _share(rest, total)])
    header = ["kernel", "calls", "time", "share", "FLOPs", "bytes", "GFLOP/s", "GB/s", "roofline"]
    yield from _table(header, rows)
    yield ""
    layers = [
        [line.kernel, str(line.calls), time(line.time), _share(line.time, total)]
        for line in phase.layers
    ]
    yield from _table(["layer", "kernels", "time", "share"], layers)
    yield ""
    slowest = []
    for line in _by_time(phase.kernels)[:MOST]:
        cells = [time(line.time), _share(line.time, total), _roofline(line)]
        slowest.append([line.kernel, *cells, line.module, line.line])
    yield from _table(["slowest calls", "time", "share", "roofline", "module", "line"], slowest)


def _by_time(kernels: Sequence[KernelLine]) -> list[KernelLine]:
    return sorted(kernels, key=lambda line: -line.time.seconds)


def _row(name: str, line: KernelLine, total: float) -> list[str]:
    seconds, at_most = line.time.seconds, "<= " if line.at_most else ""
    return [
        name,
        str(line.calls),
        time(line.time),
        _share(line.time, total),
        "" if not line.flops else count(line.flops),
        "" if line.bytes is None else at_most + size(line.bytes),
        "" if not line.flops else f"{line.flops / seconds / 1e9:.1f}",
        "" if line.bytes is None else f"{at_most}{line.bytes / seconds / 1e9:.1f}",
        _roofline(line),
    ]


def _roofline(line: KernelLine) -> str:
    if line.least is None:
        return ""
    return f"{'<= ' if line.at_most else ''}{line.least / line.time.seconds:.0%}"


def _share(part: Time, total: float) -> str:
    return f"{part.seconds / total:.1%}"


def time(time: Time) -> str:
    """12.3 us (12.0 to 12.9)."""
    unit, per_second, digits = ("ms", 1e3, 2) if time.seconds >= 1e-3 else ("us", 1e6, 1)
    mean, low, high = (
        f"{each * per_second:.{digits}f}" for each in (time.seconds, time.low, time.high)
    )
    return f"{mean} {unit} ({low} to {high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their cells; the first one, and those of names, to the left."""
    full = [list(header), *([*row, *[""] * (len(header) - len(row))] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    left = [name in ("module", "line") or number == 0 for number, name in enumerate(header)]
    for row in full:
        cells = [
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(row, widths, left, strict=True)
        ]
        yield "  ".join(cells).rstrip()
