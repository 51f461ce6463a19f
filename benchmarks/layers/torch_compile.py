"""One MoE layer with OLMoE's shape in torch.compile: moec's backend against Inductor alone.

    python -m benchmarks.layers.torch_compile [--tokens 1,64,512] [--dtype bfloat16] [--rounds 15]
    python -m benchmarks.layers.torch_compile --train [--tokens 64,512] [--rounds 5]

Inference compares the artifact of `moec.compile`, `torch.compile(backend="moec")` with either value
of `rest`, and Inductor alone on transformers' grouped_mm, which it can capture. Training times
forward and backward together; eager's experts are a loop. All run in one process, in turn, with the
same weights. The script prints medians in milliseconds, then the other medians divided by moec's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import moec  # noqa: E402
import moec.dynamo  # noqa: E402
from benchmarks.layers.layer import DTYPES, OLMOE, TOLERANCES, block, way  # noqa: E402
from benchmarks.layers.strays import strays  # noqa: E402
from benchmarks.records import Cell, add_record_options, record_if_asked  # noqa: E402
from moec.report.profile.limits import timed, warm  # noqa: E402
from moec.target.cpu import processor  # noqa: E402

MOEC = "moec"
Run = Callable[[Tensor], Tensor]


def compiled(layer: nn.Module, rest: str) -> Run:
    moec.prepare(layer)
    options = {"rest": rest, "strict": True}
    return torch.compile(layer, backend="moec", dynamic=True, options=options)


def trained(run: Run, layer: nn.Module) -> Run:
    """Forward and backward, starting with gradients of None, as optimisers leave them."""

    def step(x: Tensor) -> Tensor:
        layer.zero_grad(set_to_none=True)
        y = run(x.detach().requires_grad_())
        y.backward(torch.ones_like(y))
        return y.detach()

    return step


def contenders(layer: nn.Module, names: list[str], train: bool) -> dict[str, tuple[Run, nn.Module]]:
    """By name, the function to run and the module whose gradients it computes. All share their
    weights."""
    result: dict[str, tuple[Run, nn.Module]] = {}
    for name in names:
        if name == "artifact":
            x = torch.randn(1, 7, OLMOE.D, dtype=next(layer.parameters()).dtype)
            result[name] = (moec.compile(layer, (x,), verify=False), layer)
        elif name.startswith(MOEC):
            twin = way(layer, "eager")
            result[name] = (compiled(twin, "eager" if name.endswith("eager") else "inductor"), twin)
        elif name == "inductor":
            twin = way(layer, "grouped_mm")
            result[name] = (torch.compile(twin, dynamic=False), twin)
        else:
            twin = way(layer, name)
            result[name] = (twin, twin)
    if train:
        return {name: (trained(run, entry), entry) for name, (run, entry) in result.items()}
    return result


def compare(runs: dict[str, Run], x: Tensor, rounds: int) -> dict[str, float]:
    """The medians in seconds. Exits if results differ from those of the last contender."""
    dtype = str(x.dtype).removeprefix("torch.")
    expected = list(runs.values())[-1](x)
    for name, run in runs.items():
        astray, rows = strays(run(x)[0], expected[0], TOLERANCES[dtype])
        # In bf16, near ties among 64 scores send some tokens to other experts.
        if astray > (rows // 4 + 1 if dtype == "bfloat16" else 0):
            raise SystemExit(f"{name}: {astray} of {rows} rows differ")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.05)  # lets the threads of the previous contender go to sleep
            warm(partial(run, x))
            times[name].append(timed(partial(run, x)))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--only", help="contenders, with commas between them")
    add_record_options(parser, processor())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    names = ["moec", "moec-eager", "artifact", "inductor"]
    if options.train:
        names = ["moec-eager", "inductor", "grouped_mm", "eager"]
    names = options.only.split(",") if options.only else names
    tokens = options.tokens or ("64,512" if options.train else "1,64,512")
    what = "training" if options.train else "inference"
    print(f"{Path(__file__).name}: {what}, {options.dtype}, {OLMOE}")
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {THREADS} threads, load average {load:.1f}")
    rows: list[dict[str, Cell]] = []
    print("tokens" + "".join(f"{name:>16}" for name in names))
    layer = block(DTYPES[options.dtype])
    with torch.set_grad_enabled(options.train):
        layer.requires_grad_(options.train)
        result = contenders(layer, names, options.train)
        for t in map(int, tokens.split(",")):
            x = torch.randn(1, t, OLMOE.D).to(DTYPES[options.dtype])
            runs = {name: run for name, (run, _) in result.items()}
            record = compare(runs, x, options.rounds or (5 if options.train else 15))
            cells = "".join(
                f"{record[name] * 1e3:9.2f}{record[name] / record[names[0]]:6.2f}x"
                for name in names
            )
            print(f"{t:6}{cells}", flush=True)
            rows.append({"tokens": t})
            for name in names:
                rows[-1][name] = round(record[name] * 1e3, 2)
                rows[-1][f"{name} ratio"] = round(record[name] / record[names[0]], 2)
    claim = "torch-compile-training" if options.train else "torch-compile"
    case = f"olmoe, {options.dtype.replace('bfloat16', 'bf16')}"
    conditions = f"{OLMOE}; {THREADS} threads, load average {load:.1f}; milliseconds"
    record_if_asked(options, claim, case, rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
