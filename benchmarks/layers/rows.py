"""Rows of 8 and of 16 bits in products with weights of few bits: kernel times, and a layer's error.

    python -m benchmarks.layers.rows [--quant int8,int4:32]

The kernel multiplies the rows of several experts (1024 x 2048), with equally many rows each, on one
thread. Its own CPU time is measured, so other processes only affect it through caches and memory.
The script prints the least time of many runs, with the two kernels in turn. With one row per
expert, weights are read from memory (48 experts, more than the caches hold); with more rows, from
the caches (8 experts). Errors are those of the arithmetic, computed in PyTorch: a SwiGLU layer with
OLMoE's sizes against float32, relative to the norm. `exact` rows are not rounded.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["TVM_NUM_THREADS"] = "1"

import torch
import tvm
from torch import Tensor

from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.specs.products import QuantisedSpec
from moec.ir.formats.integer import dequantise, quantise, round_rows
from moec.ir.formats.notation import Format, parse
from moec.target.cpu import host, processor

N, K = 1024, 2048
CASES = {1: 48, 8: 8, 16: 8, 64: 8}  # rows per expert: number of experts
RUNS = 40


def kernel(format: Format, experts: int) -> Callable[[int], Callable[[], None]]:
    """Rows per expert -> a call of the product. Codes are random: the time does not depend on
    them."""
    spec = QuantisedSpec(N, K, "float32", "float32", groups=experts, format=format)
    target, layout = host(), QuantisedLayout(spec, host())
    module = tvm.IRModule({"quantised": quantised_linear(target, spec)})
    run = tvm.compile(module, tvm.target.Target(target.tvm()))["quantised"]
    planes = layout.row_codes.planes
    weights, scales = words(*layout.shape), torch.ones(layout.scale_shape).bfloat16()

    def of(rows: int) -> Callable[[], None]:
        count = experts * rows
        x, factors = words(count, planes * layout.x_words), torch.ones(count, layout.blocks)
        sums = torch.zeros(count, planes * layout.blocks, dtype=torch.int32)
        ends = (torch.arange(1, experts + 1) * rows).int()
        y = torch.empty(count, N)
        return lambda: run(x, factors, sums, ends, weights, scales, y)

    return of


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def compare_times(format: Format) -> None:
    ways = {e: [kernel(f, e) for f in both(format)] for e in set(CASES.values())}
    for rows, experts in CASES.items():
        calls = [result(rows) for result in ways[experts]]
        least = [float("inf")] * len(calls)
        for _ in range(RUNS):
            for i, call in enumerate(calls):
                start = time.thread_time()
                call()
                least[i] = min(least[i], time.thread_time() - start)
        few, many = least
        cells = f"{few * 1e3:12.2f}{many * 1e3:12.2f}{many / few:8.2f}"
        print(f"{format!s:>10}{experts:9}{rows:6}{cells}", flush=True)


def both(format: Format) -> list[Format]:
    return [replace(format, row_bits=bits) for bits in (8, 16)]


def compare_errors(format: Format) -> None:
    tokens, chosen = 4, 8
    experts = [[torch.randn(s) * 0.03 for s in ((N, K), (N, K), (K, N))] for _ in range(chosen)]
    stored = [[_stored(format, matrix) for matrix in expert] for expert in experts]
    x, weights = torch.randn(tokens, K), torch.randn(tokens, chosen).softmax(-1)

    def layer(matrices: list[list[Tensor]], round: Callable[[Tensor], Tensor]) -> Tensor:
        y = torch.zeros(tokens, K)
        for e, (gate, up, down) in enumerate(matrices):
            rows = round(x)
            hidden = torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)
            y += weights[:, e : e + 1] * (round(hidden) @ down.mT)
        return y

    expected = layer(experts, lambda rows: rows)
    cells = ""
    for bits in (8, 16, 0):
        module = layer(
            stored,
            lambda rows, b=bits: round_rows(rows, format.blocks(rows.shape[-1]), b) if b else rows,
        )
        cells += f"{float((module - expected).norm() / expected.norm()):12.2e}"
    print(f"{format!s:>10}{cells}", flush=True)


def _stored(format: Format, matrix: Tensor) -> Tensor:
    codes = quantise(format, matrix[None])
    return dequantise(format.kind, codes.codes, codes.scales, codes.zeros)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quant", default="int8,int4:32", help="symmetric formats")
    formats = [parse(text) for text in parser.parse_args().quant.split(",")]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, target {host().name}, one thread, milliseconds of its own CPU time")
    print("    format  experts  rows      8 bits     16 bits   ratio")
    for format in formats:
        compare_times(format)
    print("\n    errors      8 bits     16 bits       exact")
    for format in formats:
        compare_errors(format)


if __name__ == "__main__":
    main()
