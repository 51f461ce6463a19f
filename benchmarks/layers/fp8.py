"""Experts with e4m3 weights beside bf16 ones: CPU time of a layer of OLMoE's sizes, on one thread.

    python -m benchmarks.layers.fp8 [--target avx512-bf16] [--tokens 1,512] [--runs 40]

A layer is two kernels: gate and up with SwiGLU, then down, of 64 experts (8 a token, 2048 x 1024)
with activations in bf16. Layers run in turn, in a random order, with new random experts each time.
Printed are medians of the thread's own CPU time: other processes affect it through caches and
memory only.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ["TVM_NUM_THREADS"] = "1"

import torch
import tvm
from torch import Tensor
from tvm.ir import Expr

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import gathered_linear, grouped_linear
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec, QuantisedSpec
from moec.ir.formats.notation import Format
from moec.target.cpu import CpuTarget, parse, processor, require

EXPERTS, TOP_K, MODEL, HIDDEN = 64, 8, 2048, 1024
FORMATS = {"bf16": None, "fp8": 0, "fp8:128": 128}
NAN = 0x7F

Layer = Callable[[Tensor, Tensor, Tensor], None]


def layer(target: CpuTarget, block: int | None) -> Layer:
    """(x[T, MODEL], order, ends) -> a call of both kernels. Values of weights are random."""
    v = Vector(target)

    def swiglu(gate: Expr, up: Expr) -> Expr:
        return v.silu(gate) * up

    kernels, weights = [], []
    for n, k, gated in ((HIDDEN, MODEL, True), (MODEL, HIDDEN, False)):
        sizes = {"groups": EXPERTS, "gated": gated}
        top_k, epilogue = (TOP_K, swiglu) if gated else (0, None)
        if block is None:
            plain = LinearSpec(n, k, "bfloat16", **sizes)
            words = (torch.randn(*Layout(plain, target).shape, 2) * 0.02).bfloat16()
            weights.append([words.view(torch.int32).squeeze(-1)])
            kernel = gathered_linear(target, plain, top_k, epilogue) if top_k else None
            kernels.append(kernel or grouped_linear(target, plain))
            continue
        spec = QuantisedSpec(n, k, "bfloat16", **sizes, format=Format("fp8", block, row_bits=0))
        layout = QuantisedLayout(spec, target)
        codes = torch.randint(256, (*layout.shape, 4), dtype=torch.uint8)
        codes[codes & NAN == NAN] = 1
        scales = torch.full(layout.scale_shape, 1e-3, dtype=torch.bfloat16)
        weights.append([codes.view(torch.int32).squeeze(-1), scales])
        kernels.append(quantised_linear(target, spec, top_k, epilogue))
    first, second = (_function(target, kernel) for kernel in kernels)

    def run(x: Tensor, order: Tensor, ends: Tensor) -> None:
        hidden = torch.empty(len(order), HIDDEN, dtype=torch.bfloat16)
        first(x, order, ends, *weights[0], hidden)
        second(hidden, ends, *weights[1], torch.empty(len(order), MODEL, dtype=torch.bfloat16))

    return run


def _function(target: CpuTarget, kernel: tvm.tirx.PrimFunc) -> Callable[..., None]:
    built = compile_kernels(kernel, target=target)[str(kernel.attrs["global_symbol"])]
    return lambda *tensors: built(*map(tvm.runtime.from_dlpack, tensors))


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    """order and ends of random experts."""
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)]).flatten()
    ends = torch.bincount(ids, minlength=EXPERTS).cumsum(0)
    return ids.argsort(stable=True).int(), ends.int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="avx512-bf16")
    parser.add_argument("--tokens", default="1,512")
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    target = parse(options.target)
    require(target)
    layers = {name: layer(target, block) for name, block in FORMATS.items()}
    print(f"{processor()}, target {target.name}, load {os.getloadavg()[0]:.1f}")
    for tokens in map(int, options.tokens.split(",")):
        x = torch.randn(tokens, MODEL).bfloat16()
        times: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(options.runs + 1):
            order, ends = routing(tokens)
            for name in random.sample(list(layers), len(layers)):
                start = time.thread_time()
                layers[name](x, order, ends)
                if turn:
                    times[name].append(time.thread_time() - start)
        medians = {name: statistics.median(each) for name, each in times.items()}
        for name, median in medians.items():
            ratio = medians["bf16"] / median
            print(f"{tokens:4} tokens  {name:8} {median * 1e3:8.2f} ms  {ratio:.2f} x")


if __name__ == "__main__":
    main()
