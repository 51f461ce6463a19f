"""About how long a compilation takes, and how much memory: before it is done.

Both follow from what was measured of this model: the bytes of its weights, and the kernels that the
cache does not have. The rates are those of one machine, so that a number is about right at best.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moec.commands.progress import about
from moec.report.units import size

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel

COMPILER = 0.95e9
"""Bytes that torch and TVM take: the greatest that `moec compile examples/tiny_moe/checkpoint` had
resident was 972 MB, with 7 MB of weights."""
COPIES = 2
"""Times that weights are held: as they came, and packed."""
KERNEL_SECONDS = 0.45
"""A kernel through LLVM on two busy cores, where that compilation's kernels took 20.8 s with all 32
missing from the cache and 6.1 s with none."""


def memory(weights: int) -> str:
    """Of weights of so many bytes."""
    return f"about {size(int(COMPILER + COPIES * weights))} of memory"


def of_files(model: str) -> str:
    """What the files of a checkpoint tell; empty for what is no folder of one."""
    weights = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    return f"{size(weights)} of weights: {memory(weights)}" if weights else ""


def of_model(compiled: CompiledModel, opt_level: int, weights: int) -> str:
    """What a model tells that is captured and not built; its program for one token after the other
    is not counted. Raises UnsupportedError where it cannot be compiled."""
    from moec.codegen.backends import backend_for
    from moec.codegen.build import kernels_to_compile
    from moec.codegen.lower import lower
    from moec.target.cpu import CpuTarget

    if not isinstance(compiled.target, CpuTarget) or compiled.target.kind != "cpu":
        return f"a compilation needs {memory(weights)}"
    lowered = lower(compiled.module, compiled.target, backend_for(compiled.target))
    count, missing = kernels_to_compile(lowered.module, compiled.target, opt_level)
    seconds = sum(compiled.phases.values()) + missing * KERNEL_SECONDS
    return (
        f"a compilation takes about {about(seconds)} and {memory(weights)}: {missing} of {count} "
        "kernels of the forward pass are not in the cache"
    )
