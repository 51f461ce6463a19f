"""The data of a profile, which `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moec.report.profile.cost import Cost


@dataclass(frozen=True)
class Time:
    """Seconds: their mean over the repetitions whose call took neither little nor long (the middle
    half of them), and the quartiles of all. So means of parts add up to that of the call."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class MachineLimits:
    """FLOP/s of all threads in `dtype`, and bytes/s that they read from memory, as measured."""

    dtype: str
    peak: float
    bandwidth: float

    def least(self, cost: Cost) -> float:
        """The least seconds of some work."""
        return max(cost.flops / self.peak, cost.bytes / self.bandwidth)


@dataclass(frozen=True)
class KernelLine:
    """One call of a kernel in each repetition, or all calls of one kind or layer: `calls`.

    `kernel` is its kind, `symbol` its name in the library; `ops` are those of the IR that it
    computes. `module` and `line` are the user's. FLOPs, bytes and the least seconds of this work
    are None where they are not known; `at_most`: the experts in use were not known.
    """

    kernel: str
    time: Time
    calls: int = 1
    flops: float | None = None
    bytes: float | None = None
    least: float | None = None
    at_most: bool = False
    symbol: str = ""
    layer: str = ""
    module: str = ""
    line: str = ""
    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class PhaseProfile:
    """One phase: `call` is the time of its calls with the clock, `plain` that without, and
    `overhead` the median of how much longer a call takes than the one before without it, as a
    share. `between` kernels, in the library, sizes and memory are computed; `outside` of it is the
    rest. `kinds` and `layers` are sums of `kernels`. `sizes` are those of the last
    call of a repetition."""

    name: str
    function: str
    repetitions: int
    sizes: Mapping[str, int]
    call: Time
    plain: Time
    overhead: float
    outside: Time
    between: Time
    kinds: tuple[KernelLine, ...]
    layers: tuple[KernelLine, ...]
    kernels: tuple[KernelLine, ...]


@dataclass(frozen=True)
class ProfileData:
    """The phases of a model on a machine."""

    model: str
    machine: str
    threads: int
    limits: MachineLimits
    phases: tuple[PhaseProfile, ...]
