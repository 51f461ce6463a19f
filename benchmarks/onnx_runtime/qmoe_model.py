"""QMoE's figure for whole models: the time of a compressed model over that of the same in bf16.

    python -m benchmarks.onnx_runtime.qmoe_model [--layers 2] [--experts 8] [--tokens 1]
        [--rounds 15] [--record FILE.jsonl]

The Switch transformer of examples/systems/19_qmoe.py with the widths of base128 (arXiv 2310.16795,
table 6), and fewer layers and experts, so that compiling it takes about a minute. The experts of a
layer exceed the last-level cache. A token meets 19 MB of experts' weights among 115 MB in bf16; in
base128 it would meet 113 MB among 445 MB. moec compiles both models; they take turns in one
process. The script prints the median milliseconds of each, and the median of the quotients of the
rounds. The weights are random, of a normal distribution, and rounded to nearest, which leaves about
as many zeros as the paper reports; the time does not depend on what they were solved on. The paper
reports less than 1.05, next to an estimate of bf16 in which all experts share one weight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.systems.latency import THREADS, Run, examples

import torch  # isort: skip

import moec
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.report.profile.limits import timed, warm
from moec.target.cpu import processor

TEXTS = 8
ROWS = 16  # of calibration for an expert; rounding to nearest does not read them
PAUSE = 0.05  # seconds, in which the threads of the other model go to sleep
PASSES = "+compress-experts(by=nearest)"


def compiled(model: torch.nn.Module, size: Any, tokens: int, passes: str) -> moec.CompiledModel:
    """The model for texts of `tokens` tokens, with one token of the decoder each."""

    def texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(size.words, (count, tokens)), torch.zeros(count, 1, dtype=torch.long)

    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim.STATIC}
    rows = dict(zip(("input_ids", "decoder_ids"), texts(ROWS * size.experts), strict=True))
    return moec.compile(
        model,
        texts(3),
        dynamic_shapes=(sizes, sizes),
        passes=passes,
        calib=rows if passes else None,
        kv_cache=False,
        verify=False,
    )


def read(run: Any, texts: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Runs the model on one text after the other, so that each finds few experts in the caches."""
    for text in texts:
        run(*text)


def measure(ways: dict[str, Run], rounds: int) -> tuple[dict[str, float], float]:
    """The median time of a text in seconds for each way, and the median of the first's over the
    second's."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            time.sleep(PAUSE)
            warm(run)
            seconds[way].append(timed(run) / TEXTS)
    first, second = seconds.values()
    ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
    return {way: statistics.median(times) for way, times in seconds.items()}, ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of encoder and decoder each")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", default="1", help="of the encoder; the decoder has one")
    parser.add_argument("--rounds", type=int, default=15)
    add_record_options(parser, processor())
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ((_, example),) = examples({19})
    size = replace(example.PUBLISHED["base128"][0], layers=options.layers, experts=options.experts)
    conditions = f"{THREADS} threads; load average before {os.getloadavg()[0]:.1f}"
    model = example.SwitchTransformer(size).to(torch.bfloat16).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    start = torch.zeros(1, 1, dtype=torch.long)
    rows: list[dict[str, Cell]] = []
    for tokens in map(int, options.tokens.split(",")):
        texts = [(torch.randint(size.words, (1, tokens)), start) for _ in range(TEXTS)]
        models = {
            way: compiled(model, size, tokens, passes)
            for way, passes in (("ternary", PASSES), ("bf16", ""))
        }
        for damage in models["ternary"].report().damage:
            print(*(f"{line.layer}: {line.says}" for line in damage.layers), sep="\n")
        ways = {way: partial(read, run, texts) for way, run in models.items()}
        medians, ratio = measure(ways, options.rounds)
        cells: dict[str, Cell] = {way: round(1e3 * t, 2) for way, t in medians.items()}
        rows.append({"tokens": tokens, **cells, "ratio": round(ratio, 2)})
        print("  ".join(f"{key} {cell}" for key, cell in rows[-1].items()), flush=True)
    case = (
        f"base128's widths, {options.layers} + {options.layers} layers, {options.experts} experts"
    )
    record_if_asked(options, "compressed-model", case, rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
