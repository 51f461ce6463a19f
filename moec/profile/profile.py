"""A profile: the time of each kernel of a model, beside its work and the machine's limits."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import ArtifactError
from moec.files.printable import preformatted
from moec.ir.graph import Graph
from moec.profile.data import KernelLine, MachineLimits, PhaseProfile, ProfileData, Time
from moec.profile.record import TimedPhase
from moec.profile.roofline import plot
from moec.profile.text import lines
from moec.profile.trace import trace
from moec.profile.work import KernelCost, work_of
from moec.runtime.call.profile import SHAPES, TimedCall
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
