"""DeepSpeed-MoE's layer as einsums over [S, E, C], and compiled by moec: latency by tokens.

    python -m benchmarks.layers.einsum_moe [--tokens 16] [--rounds 7] [--record FILE.jsonl]

A top-1 layer of the 350M model with 32 experts (arXiv 2201.05596, table 1), float32, from
examples/systems/02_deepspeed_moe.py. The einsums compute all C slots of every expert, at least 4,
filled or not; the tables of moec only contain the chosen experts. All ways run in one process, in
turn in every round. The script prints the least time of each in milliseconds, and eager's time
divided by moec's. That ratio corresponds to figure 11 of the paper: at most 7.3 there, on 128 and
more GPUs, including the exchanges between them.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.systems.latency import THREADS, TOLERANCE, Run, examples, least_times

import torch  # isort: skip

import moec
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target.cpu import processor

EXPERTS = 32


def measure(example: Any, tokens: int, rounds: int) -> dict[str, Cell]:
    """The row of one number of tokens. Raises SystemExit if moec's results differ from eager's."""
    config = replace(example.Config(width=1024, top_k=1), factor=1.25)
    module = example.MoE(config, EXPERTS).eval().requires_grad_(False)
    inputs = (torch.randn(1, tokens, config.width), torch.rand(tokens, EXPERTS))
    compiled = moec.compile(module, inputs, verify=False, kv_cache=False)
    expected = module(*inputs)
    if float((compiled(*inputs) - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
        raise SystemExit(f"{tokens} tokens: differs from eager")
    ways: dict[str, Run] = {"moec": partial(compiled, *inputs), "einsum": partial(module, *inputs)}
    least = least_times(ways, rounds)
    cells: dict[str, Cell] = {way: round(1e3 * t, 3) for way, t in least.items()}
    return {"tokens": tokens, **cells, "ratio": round(least["einsum"] / least["moec"], 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="16")
    parser.add_argument("--rounds", type=int, default=7)
    add_record_options(parser, processor())
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    conditions = f"{THREADS} threads, float32; load average before {load:.1f}"
    ((_, example),) = examples({2})
    rows = []
    with torch.inference_mode():
        for tokens in map(int, options.tokens.split(",")):
            rows.append(measure(example, tokens, options.rounds))
            print("  ".join(f"{key} {cell}" for key, cell in rows[-1].items()), flush=True)
    record_if_asked(options, "einsum-moe", f"350M, {EXPERTS} experts, top-1", rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
