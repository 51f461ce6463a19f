"""Estimates how long a compilation takes and how much memory it needs.

Inputs are the bytes of the model's weights and the number of kernels that are not cached. The rates
were measured on one machine, so the estimate is rough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from moec import cache
from moec.commands.output.progress import about
from moec.files.gguf import is_gguf, read_header
from moec.files.safetensors import read_entries, weight_files
from moec.ir.formats.notation import parse_parts
from moec.passes.core.names import NAMES
from moec.report.units import size

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel


COMPILER, COPIES = 0.98e9, 5
"""Bytes that torch and TVM take, and how many times weights are in memory, verification included:
`moec compile` had at most 1.02 GB resident with 7 MB of weights (examples/tiny_moe), 1.80 GB with
147 MB (a layer of 128 experts) and 2.00 GB with 0.22 GB (SmolLM2). No more was measured."""
LEAST_SHARE = 1 / 16
"""Of the weights, what passes on request may leave: ternary experts, a few of them."""
KERNEL_SECONDS = 0.45
"""Seconds per kernel with LLVM on two busy cores: the kernels of tiny_moe took 20.8 s with
all 32 missing from the cache and 6.1 s with none missing."""


def memory(weights: int) -> str:
    """Text with the estimated memory for this many bytes of weights."""
    return f"about {size(int(COMPILER + COPIES * weights))} of memory"


def bytes_of_files(model: str) -> int:
    """The bytes of a checkpoint's weights, or of a file with a model; 0 for anything else."""
    path = Path(model)
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def least_bytes(model: str, options: Mapping[str, Any]) -> int:
    """The least bytes of a checkpoint's weights after --quant, --dtype and --passes: all of them in
    the format of fewest bits, or what passes on request may leave."""
    path, stored = Path(model), bytes_of_files(model)
    on_request = NAMES[NAMES.index("prune-experts") :]
    if any(f"+{name}" in (options["passes"] or "") for name in on_request):
        return int(stored * LEAST_SHARE)
    formats = parse_parts(options["quant"] or "checkpoint")
    bits = [each.bits for each in (formats.experts, formats.linears, formats.head) if each]
    bits += [32 if options["dtype"] == "float32" else 16] if options["dtype"] else []
    if not bits or not stored:
        return stored
    read = read_header(path).tensors if is_gguf(path) else read_entries(weight_files(path))
    return min(stored, min(bits) * sum(math.prod(each.shape) for each in read.values()) // 8)


def _bounded(compiled: CompiledModel, weights: int) -> str:
    """As `memory`, also where the model is not in memory as a whole."""
    from moec.sources.memory.memory import Bounded

    held = compiled.source.memory
    if not isinstance(held, Bounded):
        return memory(weights)
    return (
        f"about {size(held.budget.limit)} of memory and {size(2 * weights)} of disk, half of it "
        "for the artifact"
    )


def of_model(compiled: CompiledModel, opt_level: int, weights: int) -> str:
    """An estimate for a model that is captured but not built, without its decode program. Raises
    UnsupportedError where it cannot be compiled."""
    from moec.codegen.backends import backend_for
    from moec.codegen.build import kernels_to_compile
    from moec.codegen.lower import lower
    from moec.target.cpu import CpuTarget

    if not isinstance(compiled.target, CpuTarget) or compiled.target.kind != "cpu":
        return f"a compilation needs {_bounded(compiled, weights)}"
    lowered = lower(compiled.module, compiled.target, backend_for(compiled.target))
    count, missing = kernels_to_compile(lowered.module, compiled.target, opt_level)
    seconds = sum(compiled.phases.values()) + missing * KERNEL_SECONDS
    return (
        f"a compilation takes about {about(seconds)} and {_bounded(compiled, weights)}: {missing} "
        f"of {count} kernels of the forward pass are not in the cache"
    )


MOST = 64
"""How many runs are kept, the newest."""
ALIKE = 3
"""An estimate is the median of so many runs, those of weights of the most similar size."""
_KEY = cache.key_of("seconds by phase")


@dataclass(frozen=True)
class PastRun:
    """A compilation of `weights` bytes, and the seconds of its phases."""

    weights: int
    seconds: Mapping[str, float]


def past_runs(store: cache.Store) -> list[PastRun]:
    """The runs of this machine, oldest first; none where the entry is missing or damaged."""
    stored = cache.load(store, cache.RUNS, _KEY)
    try:
        return msgspec.json.decode(stored or b"[]", type=list[PastRun])
    except msgspec.DecodeError:
        return []


def remember(store: cache.Store, run: PastRun) -> None:
    """Add a run. Of two that end at once, one may be lost."""
    runs = [*past_runs(store), run][-MOST:]
    cache.save(store, cache.RUNS, {_KEY: msgspec.json.encode([asdict(each) for each in runs])})


def expected(
    runs: Sequence[PastRun], weights: int, otherwise: Mapping[str, float]
) -> dict[str, float]:
    """The seconds of each phase in `otherwise`, by the runs of the most similar sizes; of equally
    similar ones the newest. A phase that none of them had keeps its seconds."""

    def unlike(run: PastRun) -> float:
        return abs(math.log(max(run.weights, 1) / max(weights, 1)))

    alike = sorted(reversed(runs), key=unlike)[:ALIKE]
    times = {
        name: [run.seconds[name] for run in alike if name in run.seconds] for name in otherwise
    }
    return {name: median(times[name]) if times[name] else each for name, each in otherwise.items()}
