"""`m.profile(...)`: measures the machine, runs the model, and joins both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.errors import UsageError
from moec.ir.graph import Graph
from moec.report.profile.data import MachineLimits
from moec.report.profile.profile import ModelProfile, profile
from moec.report.profile.record import ProfiledTexts, random_tokens, record_call, record_text
from moec.runtime.package import DECODE, MAIN, Package
from moec.runtime.process.threads import available


def profile_model(
    name: str,
    package: Package,
    graph: Callable[[str], Graph],
    prompt: Sequence[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    batch: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda phase: None,
) -> ModelProfile:
    """The profile of a call with `inputs`, or of texts: `batch` times the tokens `prompt`, or as
    many random ones. `graph` returns that of a function.

    Raises UsageError where a number is below 1, the model does not continue text or is for GPUs,
    and ArtifactError where it was compiled without a clock around its kernels.
    """
    from moec.report.profile import limits

    numbers = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for option, number in {**numbers, "rounds": rounds}.items():
        if number < 1:
            raise UsageError(f"{option} is {number}: it must be at least 1")
    if inputs is not None:
        function, phases = MAIN, record_call(package, inputs, rounds, progress)
    else:
        load = random_tokens(package, batch, len(prompt or ()) or prompt_tokens, new_tokens)
        if prompt is not None:
            load = ProfiledTexts([list(prompt)] * batch, new_tokens)
        function, phases = DECODE, record_text(package, load, rounds, progress)
    outputs = package.functions[function].outputs
    kind = "bfloat16" if outputs[0].dtype == "bf16" else "float32"
    progress("measure the machine")
    measured = MachineLimits(kind, limits.peak(kind), limits.bandwidth())
    return profile(name, package, phases, {function: graph(function)}, available(), measured)
