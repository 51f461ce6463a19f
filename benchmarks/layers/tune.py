"""One MoE layer, compiled with and without --tune.

    python -m benchmarks.layers.tune [--shape olmoe] [--dtype bfloat16] [--quant FORMAT]
        [--tokens 1,8,64,512] [--rounds 21] [--append FILE.md]

Uses the layers of benchmarks/layers/layer.py. Both run in one process, in turn, on the same new
tokens in each round. The script prints medians in milliseconds, the median of the rounds' ratios
with its error, and the tuning values that were chosen (from the cache if they are known).
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from benchmarks.layers.layer import DTYPES, SHAPES, THREADS, block

import torch  # isort: skip

import moec
from moec.codegen.tuning.choose import gain
from moec.profile.limits import timed
from moec.report.data import TunedLine
from moec.target.cpu import host, processor


def compare(shape: str, dtype: str, quant: str | None, tokens: list[int], rounds: int) -> list[str]:
    """The lines to print."""
    layer = block(DTYPES[dtype], True, SHAPES[shape])
    width = SHAPES[shape].D
    example = torch.randn(1, 7, width).to(DTYPES[dtype])
    plain = moec.compile(layer, (example,), quant=quant, verify=False)
    start = time.perf_counter()
    tuned = moec.compile(layer, (example,), quant=quant, verify=False, tune=True)
    seconds = time.perf_counter() - start
    report = tuned.report()
    document = [
        f"{shape}, {quant or dtype}: {THREADS} threads, {processor()}, target {host().name}, "
        f"load average {os.getloadavg()[0]:.1f}",
        f"compiled in {seconds:.0f} s, of which tuning {report.phases['tune']:.0f} s",
        *map(_chosen, report.tuned),
        "tokens     default       tuned   times as fast",
    ]
    for count in tokens:
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            x = torch.randn(1, count, width).to(DTYPES[dtype])
            for i in (turn % 2, 1 - turn % 2):
                model = (plain, tuned)[i]
                elapsed = timed(lambda model=model, x=x: model(x))  # type: ignore[misc]
                if turn:
                    times[i].append(elapsed)
        middle, error = gain(*times)
        default, other = (statistics.median(each) * 1e3 for each in times)
        ratio = f"{math.exp(middle):.2f} ± {error:.2f}"
        document.append(f"{count:6}{default:12.2f}{other:12.2f}{ratio:>16}")
    return document


def _chosen(line: TunedLine) -> str:
    values = ", ".join(f"{name} {value}" for name, value in line.values.items()) or "default"
    gains = ", ".join(f"{tokens}: {ratio:.2f}" for tokens, ratio in line.gains.items())
    return f"{line.kernel}: {values}{f' ({gains}; ± {line.noise:.2f})' if gains else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quant", help="a format of moec compile --quant")
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--append", type=Path, help="add what is printed to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tokens = [int(count) for count in options.tokens.split(",")]
    with torch.inference_mode():
        message = compare(options.shape, options.dtype, options.quant, tokens, options.rounds)
    print("\n".join(message))
    if options.append is None:
        return
    words = [w for w in sys.argv[1:] if w not in ("--append", str(options.append))]
    command = shlex.join(["python", "-m", "benchmarks.layers.tune", *words])
    body = "\n".join(f"    {line}" for line in message)
    title = f"One layer of {options.shape}, tuned"
    with options.append.open("a", encoding="utf-8") as file:
        file.write(f"\n## {title}\n\n{date.today()}\n\n    $ {command}\n{body}\n")


if __name__ == "__main__":
    main()
