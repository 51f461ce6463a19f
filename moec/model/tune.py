"""`tune=True`: measures the kernels of one model on this machine, and reports the results."""

from __future__ import annotations

import math
from collections.abc import Callable

from moec.cache import default_store
from moec.codegen.backend import Backend
from moec.codegen.backends import backend_for
from moec.codegen.lower import lower
from moec.codegen.tuning import Tuned, tune
from moec.codegen.tuning.arguments import COLD
from moec.codegen.tuning.measure import OnThisMachine
from moec.codegen.tuning.tunable import Values
from moec.ir.graph import Module
from moec.report.data import TunedLine
from moec.target.cpu import CpuTarget, last_cache


def tune_kernels(
    module: Module,
    target: CpuTarget,
    backend: Backend | None = None,
    *,
    opt_level: int,
    progress: Callable[[str], None],
) -> tuple[dict[str, Values], tuple[TunedLine, ...]]:
    """Values for the kernels of a module that could be measured, by key, and a report line for
    each.

    Raises UnsupportedError where an op has no kernel.
    """
    lowered = lower(module, target, backend or backend_for(target))
    size = sum(weight.nbytes for weight in module.main.weights.values())
    # Rounded up to a power of two, so that models of similar size share measurements.
    footprint = min(1 << (size - 1).bit_length(), COLD * last_cache()) if size else 0
    tunings = tune(
        lowered.tunable,
        target,
        OnThisMachine(target, footprint, opt_level),
        default_store(),
        (footprint, opt_level),
        progress,
    )
    return {t.kernel.key: t.values for t in tunings if not t.why}, tuple(map(line, tunings))


def line(tuned: Tuned) -> TunedLine:
    gain = tuned.gain
    return TunedLine(
        tuned.kernel.name,
        dict(tuned.values),
        {str(t): math.exp(log) for t, (log, _) in gain.by_tokens.items()} if gain else {},
        math.expm1(gain.noise) if gain else 0.0,
        tuned.from_cache,
        tuned.why,
    )
