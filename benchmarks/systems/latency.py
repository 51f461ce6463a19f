"""The systems of examples/systems/ at the sizes of their papers: moec, eager and Inductor.

    python -m benchmarks.systems.latency [--systems 6,21] [--rounds 9] [--record FILE.jsonl]

Each example has a function `layer()` that returns a module and its inputs; `LAYER_PASSES` are the
opt-in passes that the example uses, if any. If an example evaluates every expert on every row, its
sparse form (sparse.py) runs beside it, in eager and through Inductor. All run in one process, in
turn in every round. The script prints the median time of each in milliseconds, and divided by
moec's the smallest of the others (`ratio`) and of the dense form alone (`dense ratio`). If Inductor
cannot compile a module, it prints the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
from torch import nn  # noqa: E402

import moec  # noqa: E402
from benchmarks.records import Cell, add_record_options, record_if_asked  # noqa: E402
from benchmarks.systems.sparse import sparse  # noqa: E402
from moec.report.profile.limits import timed, warm  # noqa: E402
from moec.target.cpu import processor  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "systems"
PAUSE = 0.05  # seconds, in which the threads of the previous contender go to sleep
TOLERANCE = 1e-3  # of the greatest value: float32, sums of up to some thousand terms
Run = Callable[[], Any]


def examples(numbers: set[int]) -> Iterator[tuple[str, ModuleType]]:
    """The systems that have a layer to measure; all of them if `numbers` is empty."""
    for path in sorted(FOLDER.glob("[0-9][0-9]_*.py")):
        if numbers and int(path.stem[:2]) not in numbers:
            continue
        spec = importlib.util.spec_from_file_location(f"systems_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        if hasattr(module, "layer"):
            yield path.stem, module


def inductor(module: nn.Module, inputs: tuple[Any, ...]) -> Run | str:
    """The module through torch.compile, after its first call; or the reason why it does not run."""
    torch._dynamo.reset()
    run = torch.compile(module, dynamic=False)
    try:
        run(*inputs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return partial(run, *inputs)


def measure(name: str, example: ModuleType, rounds: int) -> dict[str, Cell]:
    """The row of one system. Raises SystemExit if the results of moec or of the sparse form differ
    from eager's."""
    torch.manual_seed(0)
    module, inputs = example.layer()
    module.requires_grad_(False)
    passes = getattr(example, "LAYER_PASSES", "")  # the passes that the example uses
    compiled = moec.compile(module, inputs, passes=passes, verify=False, kv_cache=False)
    forms = {"": module}
    if (rewritten := sparse(name, module)) is not None:
        forms["sparse "] = rewritten
    ways: dict[str, Run] = {"moec": partial(compiled, *inputs)}
    for form, eager in forms.items():
        ways[f"{form}eager"] = partial(eager, *inputs)
    for way, run in ways.items():
        _compare(f"{name}: {way}", run(), module(*inputs))
    for form, eager in forms.items():
        other = inductor(eager, inputs)
        if isinstance(other, str):
            print(f"{name}: {form}Inductor: {other}")
        else:
            ways[f"{form}inductor"] = other
    medians = median_times(ways, rounds)
    row: dict[str, Cell] = {"system": name.replace("_", " ")}
    row |= {way: round(1e3 * seconds, 3) for way, seconds in medians.items()}
    ours = medians.pop("moec")
    row["ratio"] = round(min(medians.values()) / ours, 2)
    if len(forms) > 1:
        dense = min(t for way, t in medians.items() if not way.startswith("sparse"))
        row["dense ratio"] = round(dense / ours, 2)
    return row


def median_times(ways: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """The median time of each way in seconds, all run in turn in every round."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            time.sleep(PAUSE)
            warm(run)
            times[way].append(timed(run))
    return {way: statistics.median(each) for way, each in times.items()}


def _compare(way: str, outputs: Any, expected: Any) -> None:
    for ours, eager in zip(_tensors(outputs), _tensors(expected), strict=True):
        if float((ours - eager).abs().max()) > TOLERANCE * float(eager.abs().max()):
            raise SystemExit(f"{way} differs from eager")


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default="", help="numbers, separated by commas; all")
    parser.add_argument("--rounds", type=int, default=9)
    add_record_options(parser, processor())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")
    torch.set_num_threads(THREADS)
    threads = "1 thread" if THREADS == 1 else f"{THREADS} threads"
    run = f"{threads}, float32, medians of {options.rounds} rounds"
    print(f"{processor()}, {run}")
    for name, example in examples({int(n) for n in options.systems.split(",") if n}):
        conditions = f"{run}; load average before {os.getloadavg()[0]:.1f}"
        with torch.inference_mode():
            row = measure(name, example, options.rounds)
        print("  ".join(f"{key} {cell}" for key, cell in row.items()), flush=True)
        record_if_asked(options, "systems", str(row["system"]), [row], conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
