"""One MoE layer, by moec and by the implementations of transformers.

    python -m benchmarks.layers.layer [--shape olmoe] [--tokens 1,8,64,512]
        [--dtypes float32,bfloat16] [--record FILE.jsonl --machine "AMD EPYC, Zen 4"]
    python -m benchmarks.layers.layer --quant int4:32 [--tokens …] [--rounds …]

The layer is OLMoE's whole block with the sizes of a given model, router included, compiled by
`moec.compile` like any module. Shared experts are one MLP next to it, as in DeepSeek; they are left
out with --quant, because QMoE has none. All contenders run in one process, in turn in every round,
with the same weights and inputs, so that other load on the machine affects all of them. The script
prints medians in milliseconds, the best other median divided by moec's, and moec's share of the
machine's limit: the measured arithmetic peak or bandwidth, whichever binds
(moec/report/profile/limits.py). The bandwidth is the median of the measurements in the same
rounds. --onnx adds ONNX Runtime in float32, the only dtype that its MoE has a kernel for.

With --quant, moec's experts in few bits are compared with its own in bfloat16, and with ONNX
Runtime's QMoE with the same codes (QMoE is given the router's logits; at its accuracy_level 4, it
rounds rows to 8 bits if weights are in blocks). Errors are relative to the norm.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import OlmoeConfig  # noqa: E402
from transformers.models.olmoe.modeling_olmoe import (  # noqa: E402
    OlmoeMLP,
    OlmoeSparseMoeBlock,
)

import moec  # noqa: E402
from benchmarks.layers.strays import strays  # noqa: E402
from benchmarks.records import Cell, add_record_options, record_if_asked  # noqa: E402
from moec.ir.formats import notation  # noqa: E402
from moec.report.profile.limits import peak, reading, timed, warm  # noqa: E402
from moec.target.cpu import host, processor  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BF16_LOGIT = 2**-5  # twice the spacing of bf16 numbers from 2 to 4, the range of chosen logits
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
Run = Callable[[Tensor], Tensor]  # x[1, T, D] -> [1, T, D]


@dataclass(frozen=True)
class Shape:
    """Widths D of rows and H of experts, E experts, K per token, and the number of shared
    experts."""

    D: int
    H: int
    E: int
    K: int
    shared: int = 0


OLMOE = Shape(2048, 1024, 64, 8)
SHAPES = {
    "olmoe": OLMOE,
    "granite-1b": Shape(1024, 512, 32, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "mixtral-half": Shape(2048, 7168, 8, 2),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6, shared=2),
}


@dataclass(frozen=True)
class Contender:
    """A way to run the layer, and the most tokens that it is timed for."""

    name: str
    run: Run
    most_tokens: int = 1 << 30


class Block(OlmoeSparseMoeBlock):
    """OLMoE's block, and DeepSeek's shared experts next to it as one MLP of their joint width."""

    def __init__(self, config: OlmoeConfig, shared: int) -> None:
        super().__init__(config)
        wide = copy.copy(config)
        wide.intermediate_size = shared * config.intermediate_size
        self.shared = OlmoeMLP(wide) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)
        return result if self.shared is None else result + self.shared(x)


def block(dtype: torch.dtype, normalised: bool = False, shape: Shape = OLMOE) -> Block:
    config = OlmoeConfig(
        hidden_size=shape.D,
        intermediate_size=shape.H,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        norm_topk_prob=normalised,
    )
    module = Block(config, shape.shared).to(dtype).requires_grad_(False).eval()
    for weight in module.parameters():
        weight.normal_(std=0.03)
    return module


def way(layer: Block, implementation: str) -> Block:
    """The same weights with another config, which selects one of transformers' implementations."""
    twin = copy.copy(layer)
    twin._modules = dict(layer._modules)
    experts = copy.copy(layer.experts)
    experts.config = copy.deepcopy(layer.experts.config)
    experts.config._experts_implementation = implementation
    twin._modules["experts"] = experts
    return twin


def contenders(layer: Block, inductor: bool, onnx: bool) -> list[Contender]:
    """moec first. Each of transformers' implementations has the same weights and its own config."""
    first = layer.gate.weight
    x = torch.randn(1, 7, first.shape[1], dtype=first.dtype)
    compiled = moec.compile(layer, (x,))
    entries = [Contender("moec", compiled)]
    entries += [Contender(name, way(layer, name)) for name in ("eager", "grouped_mm")]
    # It copies each token's weights: suitable for one token, not for many.
    entries += [Contender("batched_mm", way(layer, "batched_mm"), most_tokens=8)]
    if inductor:
        entries += [Contender("inductor", torch.compile(way(layer, "grouped_mm"), dynamic=False))]
    if onnx and first.dtype == torch.float32:
        from benchmarks.onnx_runtime.layer import onnx_ways

        entries += [Contender(name, run) for name, run in onnx_ways(compiled, THREADS).items()]
    return entries


@dataclass(frozen=True)
class Table:
    """The printed results of one dtype or format, for benchmarks/results/layers.jsonl."""

    claim: str
    case: str
    rows: list[dict[str, Cell]]
    conditions: str


def compare(
    shape: Shape, dtype: str, tokens: list[int], rounds: int, inductor: bool, onnx: bool
) -> Table:
    """Prints the table of one dtype, and returns it."""
    layer = block(DTYPES[dtype], shape=shape)
    ways = contenders(layer, inductor, onnx)
    top, read = peak(dtype), reading()
    print(f"\n{dtype}: {THREADS} threads, {top / 1e9:.0f} GFLOP/s")
    heads = "".join(f"{c.name:>12}" for c in ways)
    print(f"tokens{heads}   ratio    GB/s  % of limit", flush=True)
    table: list[dict[str, Cell]] = []
    for t in tokens:
        x = torch.randn(1, t, shape.D).to(DTYPES[dtype])
        running = [c for c in ways if t <= c.most_tokens]
        expected = running[1].run(x)
        for c in running:
            astray, rows = strays(c.run(x)[0], expected[0], TOLERANCES[dtype])
            # In bf16, near ties among 64 scores send some tokens to other experts than in eager.
            allowed = rows // 4 + 1 if dtype == "bfloat16" else 0
            if astray > allowed:
                raise SystemExit(f"{c.name}: {astray} of {rows} rows differ from eager")
        times: dict[str, list[float]] = {c.name: [] for c in running}
        streams = []
        for _ in range(rounds):
            streams.append(read())
            for c in running:
                warm(partial(c.run, x))
                times[c.name].append(timed(partial(c.run, x)))
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        other = min(m for name, m in median.items() if name != "moec")
        stream = statistics.median(streams)
        used = len(set(layer.gate(x.view(-1, shape.D))[2].flatten().tolist()))
        expert = 3 * shape.D * shape.H  # numbers
        weights = (used + shape.shared) * expert * x.element_size()
        work = t * (shape.K + shape.shared) * 2 * expert
        limit = max(work / top, weights / stream)
        cells = "".join(
            f"{median[c.name] * 1e3:12.2f}" if c.name in median else f"{'-':>12}" for c in ways
        )
        ratio, share = other / median["moec"], limit / median["moec"]
        table.append(
            {
                "tokens": t,
                **{name: round(m * 1e3, 2) for name, m in median.items()},
                "ratio": round(ratio, 2),
                "GB/s": round(stream / 1e9, 1),
                "% of limit": round(share * 100),
            }
        )
        print(f"{t:6}{cells}{ratio:8.2f}{stream / 1e9:8.1f}{share:12.0%}", flush=True)
    claim = {"bfloat16": "layer-bf16", "float32": "layer-f32"}[dtype]
    return Table(claim, "", table, f"{THREADS} threads, {top / 1e9:.0f} GFLOP/s")


def clear_tokens(layer: Block, count: int) -> Tensor:
    """x bf16[1, count, D], random, without near ties among the choices. All contenders round the
    router's logits to bf16, which would send tokens with near ties to arbitrary experts and hide
    all other errors."""
    k = layer.gate.top_k
    rows = torch.randn(4 * count + 64, layer.gate.weight.shape[1]).bfloat16()
    best = torch.nn.functional.linear(rows.float(), layer.gate.weight).topk(k + 1).values
    return rows[best[:, k - 1] - best[:, k] > BF16_LOGIT][:count][None]


def compare_quantised(shape: Shape, text: str, tokens: list[int], rounds: int) -> Table:
    """Prints the table of one format, and returns it: times, and errors against eager in float32
    with the same weights, over tokens that go to the same experts everywhere."""
    from benchmarks.onnx_runtime.qmoe import qmoe

    layer, format = block(torch.bfloat16, True, shape), notation.parse(text)
    exact = copy.deepcopy(layer).float()
    example = torch.randn(1, 7, shape.D).bfloat16()
    compiled = moec.compile(layer, (example,), quant=text, verify=False)
    ways = [
        Contender("quantised", compiled),
        Contender("moec bf16", moec.compile(layer, (example,), verify=False)),
    ]
    if format.kind != "mxfp4" and not format.asymmetric:
        ways.append(Contender("QMoE", qmoe(layer, format, THREADS)))
    read, stored = reading(), sum(line.bytes_after for line in compiled.quantised)
    print(f"\n{text}: {THREADS} threads")
    print("tokens" + "".join(f"{c.name:>12}" for c in ways) + "    GB/s   % of it   errors")
    table: list[dict[str, Cell]] = []
    for t in tokens:
        x = clear_tokens(exact, t)
        expected = exact(x.float())
        errors = [float((c.run(x).float() - expected).norm() / expected.norm()) for c in ways]
        times: dict[str, list[float]] = {c.name: [] for c in ways}
        streams = []
        for _ in range(rounds):
            streams.append(read())
            for c in ways:
                time.sleep(0.05)  # lets the threads of the previous contender go to sleep
                warm(partial(c.run, x))
                times[c.name].append(timed(partial(c.run, x)))
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        used = len(set(layer.gate(x.view(-1, shape.D))[2].flatten().tolist()))
        stream = statistics.median(streams)
        share = stored * used / shape.E / stream / median["quantised"]
        cells = "".join(f"{median[c.name] * 1e3:12.2f}" for c in ways)
        message = ", ".join(f"{e:.1e}" for e in errors)
        table.append(
            {
                "tokens": t,
                **{name: round(m * 1e3, 2) for name, m in median.items()},
                "GB/s": round(stream / 1e9, 1),
                "% of bandwidth": round(share * 100),
                "errors": message,
            }
        )
        print(f"{t:6}{cells}{stream / 1e9:8.1f}{share:10.0%}   {message}", flush=True)
    return Table("layer-quantised", text, table, f"{THREADS} threads")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="olmoe", choices=SHAPES)
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-inductor", action="store_true", help="it takes minutes to compile")
    parser.add_argument("--onnx", action="store_true", help="also ONNX Runtime, in float32")
    parser.add_argument("--quant", help="a format of moec compile --quant, beside QMoE")
    add_record_options(parser, processor())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    run(options)
    return 0


def run(options: argparse.Namespace) -> None:
    shape = SHAPES[options.shape]
    if options.quant:
        shape = replace(shape, shared=0)
    shared = f" + {shape.shared} shared" if shape.shared else ""
    sizes = f"D={shape.D} H={shape.H} E={shape.E} k={shape.K}{shared}"
    print(f"{options.shape}: {sizes}, torch {torch.__version__}")
    load = os.getloadavg()[0]
    print(f"{processor()}, target {host().name}, load average before: {load:.1f}")
    tokens = [int(t) for t in options.tokens.split(",")]
    inductor, onnx = not options.no_inductor, options.onnx
    with torch.inference_mode():
        if options.quant:
            tables = [compare_quantised(shape, options.quant, tokens, options.rounds)]
        else:
            tables = [
                compare(shape, dtype, tokens, options.rounds, inductor, onnx)
                for dtype in options.dtypes.split(",")
            ]
            ahead = all(float(str(row["ratio"])) >= 1.2 for t in tables for row in t.rows)
            print("moec is at least 1.2 times faster everywhere:", "yes" if ahead else "NO")
    for table in tables:
        case = f"{options.shape}, {table.case}" if table.case else options.shape
        conditions = (
            f"{options.shape}: {sizes}; target {host().name}; {table.conditions}; "
            f"load average {load:.1f}"
        )
        record_if_asked(options, table.claim, case, table.rows, conditions)


if __name__ == "__main__":
    sys.exit(main())
