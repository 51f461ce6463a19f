"""A profile: the time of each kernel of a model, beside its work and the machine's limits."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import ArtifactError
from moec.files.printable import preformatted
from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import evaluate_dim
from moec.report.profile.cost import Cost, Env, op_cost, size_of
from moec.report.profile.data import KernelLine, MachineLimits, PhaseProfile, ProfileData, Time
from moec.report.profile.record import Run, TimedPhase
from moec.report.profile.text import lines
from moec.runtime.call.profile import SHAPES, SortedRows, TimedCall
from moec.runtime.package import KernelCall, Package
from moec.target.cpu import processor

Floats = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class ModelProfile:
    """A profile, printed as tables, and the calls that it is of."""

    data: ProfileData
    recorded: tuple[TimedPhase, ...]

    def __str__(self) -> str:
        return "\n".join(lines(self.data))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    @property
    def phases(self) -> tuple[PhaseProfile, ...]:
        return self.data.phases

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-compatible dicts, lists and numbers."""
        return asdict(self.data)

    def trace(self) -> dict[str, Any]:
        """The calls of the last round as a trace in Chrome's format, for ui.perfetto.dev."""
        return trace(self.data, self.recorded)

    def plot(self, path: Path | str) -> None:
        """Draw the speed of kernels under the machine's limits, as a .png, .svg or .pdf. Raises
        UsageError where matplotlib is missing."""
        plot(self.data, Path(path))


def profile(
    model: str,
    package: Package,
    phases: Sequence[TimedPhase],
    graphs: Mapping[str, Graph],
    threads: int,
    limits: MachineLimits,
) -> ModelProfile:
    """The profile of recorded phases. `graphs` are those of their functions.

    Raises ArtifactError where the artifact does not list the calls of kernels.
    """
    machine = f"{processor()}, {platform.machine()}"
    parts = (phase_profile(p, package, graphs[p.function], limits) for p in phases)
    data = ProfileData(model, machine, threads, limits, tuple(parts))
    return ModelProfile(data, tuple(phases))


def phase_profile(
    phase: TimedPhase, package: Package, graph: Graph, limits: MachineLimits
) -> PhaseProfile:
    sites = package.calls.get(phase.function, ())
    first = phase.timed[0][0]
    columns = [n for n, name in enumerate(first.kernels) if not name.startswith(SHAPES)]
    if len(columns) != len(sites):
        raise ArtifactError(
            f"{phase.function} runs {len(columns)} kernels, and the artifact lists {len(sites)} "
            "calls: compile the model again with this version of moec"
        )
    calls, functions, kernels = _seconds(phase.timed, columns)
    middle = _middle(calls)

    def time(samples: Floats) -> Time:
        return _time(samples, middle)

    works = [work_of(site, number, graph, phase.watched) for number, site in enumerate(sites)]
    kernel_lines = [
        _line(first.kernels[column], site, work, time(kernels[:, n]), limits)
        for n, (column, site, work) in enumerate(zip(columns, sites, works, strict=True))
    ]

    def sums(key: Callable[[KernelLine], str]) -> tuple[KernelLine, ...]:
        groups: dict[str, list[int]] = {}
        for number, line in enumerate(kernel_lines):
            groups.setdefault(key(line), []).append(number)
        return tuple(
            _sum(name, [kernel_lines[n] for n in part], time(kernels[:, part].sum(1)))
            for name, part in groups.items()
        )

    plain = np.array([_wall(run) for run in phase.plain])
    return PhaseProfile(
        phase.name,
        phase.function,
        len(calls),
        dict(phase.timed[0][-1].sizes),
        time(calls),
        _time(plain, _middle(plain)),
        float(np.median(calls / plain)) - 1,
        time(calls - functions),
        time(functions - kernels.sum(1)),
        sums(lambda line: line.kernel),
        sums(lambda line: line.layer),
        tuple(kernel_lines),
    )


def _wall(run: Sequence[TimedCall]) -> float:
    return sum(call.end - call.start for call in run) / 1e9


def _seconds(
    runs: Sequence[Sequence[TimedCall]], columns: Sequence[int]
) -> tuple[Floats, Floats, Floats]:
    """Of each repetition: seconds of its calls [R], of the function [R], of its kernels [R, K]."""
    spans = np.array(
        [sum((np.diff(call.spans)[:, 0] for call in run), start=np.int64(0)) for run in runs]
    )
    each = spans / 1e9
    return np.array([_wall(run) for run in runs]), each[:, 0], each[:, 1:][:, list(columns)]


def _middle(samples: Floats) -> NDArray[np.intp]:
    """The indices of the middle half of samples, by their size."""
    count = len(samples)
    return np.argsort(samples)[count // 4 : count - count // 4]


def _time(samples: Floats, middle: NDArray[np.intp]) -> Time:
    low, high = np.quantile(samples, (0.25, 0.75))
    return Time(float(samples[middle].mean()), float(low), float(high))


def _line(
    symbol: str, site: KernelCall, work: KernelCost, time: Time, limits: MachineLimits
) -> KernelLine:
    cost = work.cost
    return KernelLine(
        kind_of(symbol),
        time,
        flops=cost.flops if cost else None,
        bytes=cost.bytes if cost else None,
        least=limits.least(cost) if cost else None,
        at_most=work.at_most,
        symbol=symbol,
        layer=layer_of(site.origin),
        module=site.origin,
        line=site.line,
        ops=work.ops,
    )


def _sum(name: str, lines: Sequence[KernelLine], time: Time) -> KernelLine:
    """Several lines as one; what is not known of all is not known."""

    def total(values: Sequence[float | None]) -> float | None:
        numbers = [value for value in values if value is not None]
        return sum(numbers) if len(numbers) == len(values) else None

    return KernelLine(
        name,
        time,
        len(lines),
        total([line.flops for line in lines]),
        total([line.bytes for line in lines]),
        total([line.least for line in lines]),
        any(line.at_most for line in lines),
    )


def kind_of(symbol: str) -> str:
    """The name of a kernel without the hash of its content."""
    return re.sub(r"_[0-9a-f]{16}$", "", symbol)


def layer_of(module: str) -> str:
    """model.layers.0 of model.layers.0.mlp; a module in no layer is one by itself."""
    if not module:
        return "(no module)"
    match = re.match(r".*?(?:^|\.)\d+(?=\.|$)", module)
    return match[0] if match else module


# ---- the roofline of a profile as a picture: speeds of kernels, by their FLOPs per byte ---


COLOURS = ("#0b6e4f", "#b23a48", "#3a5ab2", "#b2873a")
"""Of phases."""


def plot(profile: ProfileData, path: Path) -> None:
    """One point for each kind of kernel with arithmetic in each phase, as large as its share of the
    call, under the limits of the machine."""
    from matplotlib.figure import Figure

    limits = profile.limits
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    intensities = [limits.peak / limits.bandwidth]
    for phase, colour in zip(profile.phases, COLOURS, strict=False):
        axis.scatter([], [], color=colour, label=phase.name)
        points = [
            (line.flops / line.bytes, line.flops / line.time.seconds / 1e9, line)
            for line in phase.kinds
            if line.flops and line.bytes
        ]
        height = math.inf  # of a name, in decades of speed; kernels of one token are close together
        for intensity, speed, line in sorted(points, key=lambda p: -p[1]):
            area = 20 + 600 * line.time.seconds / phase.call.seconds
            axis.scatter(intensity, speed, area, color=colour, alpha=0.6)
            height = min(math.log10(speed), height - 0.06)
            style = {"xytext": (12, -3), "textcoords": "offset points", "fontsize": 7}
            axis.annotate(line.kernel, (intensity, 10**height), **style)
            intensities.append(intensity)
    reach = np.array([min(intensities) / 4, intensities[0], max(intensities) * 4])
    roof = np.minimum(limits.peak, reach * limits.bandwidth) / 1e9
    axis.loglog(reach, roof, color="#444444", linewidth=1)
    axis.set_xlabel("FLOPs per byte")
    axis.set_ylabel("GFLOP/s")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        f"{profile.model}: measured {limits.peak / 1e9:.0f} GFLOP/s in {limits.dtype}, "
        f"{limits.bandwidth / 1e9:.1f} GB/s",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


# ---- a profile as a trace in Chrome's format -----------------------------------------
# Perfetto (ui.perfetto.dev) opens it: the calls of the last round, the library's function in each,
# and the kernels in that.


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


PASSES_OVER = ("nn.rms_norm", "nn.add_norm", "moe.combine", "moe.sort")
"""Ops that read all of their inputs, and are no products."""
GROUPED = ("grouped.linear", "grouped.quantised", "grouped.mixed", "grouped.compressed")


@dataclass(frozen=True)
class KernelCost:
    """The cost of a call, on average over repetitions; None where it is not known. `at_most`: the
    weights of all experts that rows could have chosen are counted. `ops` are names of ops."""

    cost: Cost | None
    at_most: bool
    ops: tuple[str, ...]


def work_of(site: KernelCall, number: int, graph: Graph, runs: Sequence[Run]) -> KernelCost:
    """The work of the call `number` of a function, for the arguments that were watched in runs."""
    named = _by_output(graph)
    ops = tuple(named[name] for name in site.ops if name in named)
    names = tuple(op.name for op in ops)
    if not ops or len(ops) < len(site.ops):
        return KernelCost(None, False, names)
    costs, at_most = [], False
    for run in runs:
        for call in run:
            cost, unknown = _cost(ops, number, graph, call)
            if cost is None:
                return KernelCost(None, False, names)
            costs.append(cost)
            at_most |= unknown
    total = sum(costs, Cost())
    return KernelCost(Cost(total.flops / len(runs), total.bytes / len(runs)), at_most, names)


@cache
def _by_output(graph: Graph) -> dict[str, Op]:
    """Ops by the name of their first output."""
    return {op.outputs[0].name: op for op in graph.ops}


@cache
def _params(graph: Graph) -> frozenset[Value]:
    return frozenset(graph.params)


def _cost(
    ops: Sequence[Op], number: int, graph: Graph, call: TimedCall
) -> tuple[Cost | None, bool]:
    """The cost of a kernel that computes `ops`, and whether it is an upper bound."""
    params, at_most = _params(graph), False
    env: Env = call.sizes
    held = {state.before for state in graph.states}
    inside = {value for op in ops for value in op.outputs}
    total, read = Cost(), set[Value]()
    for op in ops:
        rows = None
        if op.name in GROUPED:
            rows, unknown = _rows(op, env, call.sorted_rows[number])
            at_most |= unknown
        cost = op_cost(op, env, call.context, params, rows)
        if cost is None and op.name not in PASSES_OVER:
            return None, False
        total += cost or Cost(0, sum(size_of(v, env) for v in op.inputs if v in params))
        keys_and_values = op.inputs[1:3] if op.name == "nn.attention" else ()
        read.update(v for v in op.inputs if v not in keys_and_values)
    read -= {*params, *held, *inside}
    moved = sum(size_of(value, env) for value in (*read, *inside))
    return total + Cost(0, moved), at_most


def _rows(op: Op, env: Env, candidates: Sequence[SortedRows]) -> tuple[SortedRows, bool]:
    """The rows of experts by an argument of the kernel; where none has them, with as many experts
    as there could be, and True."""
    experts = evaluate_dim(op.inputs[1].shape[0], env)
    rows = evaluate_dim(op.outputs[0].shape[0], env)
    fitting = [each for each in candidates if each.experts == experts and each.rows <= rows]
    if fitting:
        return max(fitting, key=lambda each: each.rows), False
    return SortedRows(experts, rows, min(experts, rows)), True
