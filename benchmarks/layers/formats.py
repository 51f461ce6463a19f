"""Formats of few bits beside each other: a layer of OLMoE's sizes, router included.

    python -m benchmarks.layers.formats [--formats int4:32,int3:32,int2:32] [--tokens 1,8,64]
    python -m benchmarks.layers.formats --formats int4:32+int2:32,int4:32,int2:32

Of `a+b` the experts have the formats in turn; the last line is then the mean of the times of each
alone, divided by that.
Layers of all formats run in turn in every round, each after a call with other rows, so that its
weights are not in the caches. Printed are the median times in milliseconds, and the medians over
rounds of the first format's time divided by each: other load on the machine affects all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time

from benchmarks.layers.layer import OLMOE, THREADS, Block, block  # first: it sets the threads
from moec.ir.formats.notation import parse
from moec.model.compiled import CompiledModel
from moec.passes.quantise.fixed_formats import FixedFormats
from moec.passes.quantise.mixed_experts import ExpertFormats
from moec.target.cpu import host, processor

import torch  # isort: skip
from torch import Tensor  # isort: skip

import moec  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", default="int4:32,int3:32,int3:64,int2:32,int2:64")
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cpu", action="store_true", help="CPU time; set TVM_NUM_THREADS=1 for it")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.manual_seed(0)
    print(f"{processor()}, target {host().name}, {THREADS} threads")
    layer, example = block(torch.bfloat16, True, OLMOE), torch.randn(1, 7, OLMOE.D).bfloat16()
    with torch.inference_mode():
        runs = {text: compiled(layer, example, text) for text in options.formats.split(",")}
        for tokens in map(int, options.tokens.split(",")):
            times: dict[str, list[float]] = {text: [] for text in runs}
            for _ in range(options.rounds):
                for text, run in runs.items():
                    run(torch.randn(1, tokens, OLMOE.D).bfloat16())
                    x = torch.randn(1, tokens, OLMOE.D).bfloat16()
                    start = clock()
                    run(x)
                    times[text].append(clock() - start)
            first = next(iter(times.values()))
            for text, each in times.items():
                ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
                median = statistics.median(each) * 1e3
                print(f"{tokens:4} tokens  {text:20} {median:8.2f} ms  {ratio:.2f} x", flush=True)
            for text in (text for text in times if "+" in text):
                alone = zip(*(times[part] for part in text.split("+")), strict=True)
                means = [statistics.mean(each) for each in alone]
                ratio = statistics.median(m / t for m, t in zip(means, times[text], strict=True))
                print(f"{tokens:4} tokens  mean / {text}  {ratio:.3f}", flush=True)


def compiled(layer: Block, example: Tensor, text: str) -> CompiledModel:
    if "+" not in text:
        return moec.compile(layer, (example,), quant=text, verify=False)
    rest, *others = map(parse, text.split("+"))
    turns = len(others) + 1
    numbers = [tuple(range(i, OLMOE.E, turns)) for i in range(1, turns)]
    mixed = ExpertFormats(rest, tuple(zip(others, numbers, strict=True)))
    every = FixedFormats({"experts": mixed, "experts#2": mixed})
    return moec.compile(layer, (example,), passes=[every], quant="none", verify=False)


if __name__ == "__main__":
    main()
