"""One MoE layer of OLMoE's shape, by moec and by the ways that transformers has to run it.

    python benchmarks/layer.py [--tokens 1,8,64,512] [--dtypes float32,bfloat16] [--rounds 15]

All contenders run in one process, one after the other in every round, with the same weights
and routings, so that whatever else the machine does falls on all of them. Printed are medians
in milliseconds, how many times moec's median the best other one takes, and moec's share of what
the machine can do: measured arithmetic peak (a kernel that only adds products in registers)
and measured bandwidth (a kernel that only reads), both in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moec.runtime.threads import set_threads

THREADS = set_threads()

import torch  # noqa: E402
import tvm  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import OlmoeConfig  # noqa: E402
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402

from moec.codegen.cpu.combine import combine  # noqa: E402
from moec.codegen.cpu.dispatch import dispatch  # noqa: E402
from moec.codegen.cpu.grouped import gathered_linear, grouped_linear  # noqa: E402
from moec.codegen.cpu.layout import Layout, LinearSpec  # noqa: E402
from moec.codegen.cpu.pack import pack  # noqa: E402
from moec.codegen.cpu.vector import Vector  # noqa: E402
from moec.target import host  # noqa: E402

D, H, E, K = 2048, 1024, 64, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # x[T, D], experts[T, K], weights[T, K] -> [T, D]


@dataclass(frozen=True)
class Contender:
    """A way to run the layer, and the most tokens that it is worth timing for."""

    name: str
    run: Run
    most_tokens: int = 1 << 30


def moec_kernels(layer: OlmoeExperts, dtype: str) -> Run:
    """The four kernels as a compiled model calls them: dispatch, up, down, combine."""
    target = host()
    v = Vector(target)
    up = LinearSpec(H, D, dtype, groups=E, gated=True)
    down = LinearSpec(D, H, dtype, "float32", groups=E)
    functions = [
        dispatch(E, K, "dispatch"),
        gathered_linear(target, up, K, lambda g, u: v.silu(g) * u, name="up"),
        grouped_linear(target, down, name="down"),
        combine(target, E, K, D, dtype, weights_dtype=dtype, name="combine"),
    ]
    module = tvm.IRModule({f.attrs["global_symbol"]: f for f in functions})
    library = tvm.compile(module, tvm.target.Target(target.tvm()))
    gate_up = layer.gate_up_proj.detach()
    w_up = _tvm(torch.from_numpy(pack(Layout(up, target), gate_up[:, :H], gate_up[:, H:])))
    w_down = _tvm(torch.from_numpy(pack(Layout(down, target), layer.down_proj)))
    sort, gather, group, bring = (library[n] for n in ("dispatch", "up", "down", "combine"))

    def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        rows = experts.numel()
        order, ends = torch.empty(rows, dtype=torch.int32), torch.empty(E, dtype=torch.int32)
        slots, out = torch.empty(experts.shape, dtype=torch.int32), torch.empty_like(x)
        o, s, e = _tvm(order), _tvm(slots), _tvm(ends)
        h, y = _tvm(torch.empty(rows, H, dtype=x.dtype)), _tvm(torch.empty(rows, D))
        sort(_tvm(experts), o, s, e)
        gather(_tvm(x), o, e, w_up, h)
        group(h, e, w_down, y)
        bring(y, s, e, _tvm(weights), _tvm(out))
        return out

    return run


def transformers_ways(layer: OlmoeExperts) -> list[Contender]:
    def way(implementation: str, function: Callable[..., Tensor]) -> Run:
        def run(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            layer.config._experts_implementation = implementation
            return function(x, experts, weights)

        return run

    compiled = torch.compile(layer, dynamic=False)
    return [
        Contender("eager", way("eager", layer)),
        Contender("grouped_mm", way("grouped_mm", layer)),
        # It copies each token's weights: the fastest way for one token, absurd for many.
        Contender("batched_mm", way("batched_mm", layer), most_tokens=8),
        Contender("inductor", way("grouped_mm", compiled)),
    ]


def _tvm(tensor: Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.from_dlpack(tensor)


def peak(dtype: str) -> float:
    """FLOP/s of all threads on sums of products that never leave the registers."""
    target, steps, sums = host(), 400_000, 24
    v = Vector(target)
    pairs = dtype == "bfloat16" and target.bf16_dot
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("peak")
            T.func_attr({"global_symbol": "peak", "tir.noalias": True})
            x = T.match_buffer(T.arg("x", T.handle()), (1,), "int32")
            y = T.match_buffer(T.arg("y", T.handle()), (THREADS, sums * v.lanes), "float32")
            with v.functions(), T.parallel(0, THREADS) as thread:
                lanes = T.ramp(0, 1, v.lanes)
                acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(sums)]
                for a in acc:
                    T.buffer_store(a, v.splat(0.0), [lanes])
                whole = T.bind(T.broadcast(x[0], v.lanes))
                real = T.bind(T.broadcast(T.cast(x[0], "float32"), v.lanes))
                with T.serial(0, steps):
                    for a in acc:
                        old = a[lanes]
                        new = v.dot2(old, whole, whole) if pairs else v.fma(real, real, old)
                        T.buffer_store(a, new, [lanes])
                for j, a in enumerate(acc):
                    v.store(y, [thread, j * v.lanes], a[lanes])
    function = tvm.compile(builder.get(), tvm.target.Target(target.tvm()))["peak"]
    x, y = torch.zeros(1, dtype=torch.int32), torch.empty(THREADS, sums * v.lanes)
    seconds = best(lambda: function(_tvm(x), _tvm(y)))
    return THREADS * steps * sums * v.lanes * (4 if pairs else 2) / seconds


def bandwidth() -> float:
    """Bytes/s of all threads that read 512 MiB in turn and keep a sum."""
    target, parts = host(), 64
    v = Vector(target)
    each = (1 << 27) // parts
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name("read")
            T.func_attr({"global_symbol": "read", "tir.noalias": True})
            x = T.match_buffer(T.arg("x", T.handle()), (parts, each), "float32")
            y = T.match_buffer(T.arg("y", T.handle()), (parts, 8 * v.lanes), "float32")
            with v.functions(), T.parallel(0, parts) as part:
                lanes = T.ramp(0, 1, v.lanes)
                acc = [T.alloc_buffer((v.lanes,), "float32") for _ in range(8)]
                for a in acc:
                    T.buffer_store(a, v.splat(0.0), [lanes])
                with T.serial(0, each // (8 * v.lanes)) as i:
                    for j, a in enumerate(acc):
                        new = a[lanes] + v.load(x, [part, (i * 8 + j) * v.lanes])
                        T.buffer_store(a, new, [lanes])
                for j, a in enumerate(acc):
                    v.store(y, [part, j * v.lanes], a[lanes])
    function = tvm.compile(builder.get(), tvm.target.Target(target.tvm()))["read"]
    x, y = torch.zeros(parts, each), torch.empty(parts, 8 * v.lanes)
    return x.numel() * 4 / best(lambda: function(_tvm(x), _tvm(y)))


def best(action: Callable[[], object], rounds: int = 7) -> float:
    return min(timed(action) for _ in range(rounds))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def routing(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    experts = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    return torch.randn(tokens, D).to(dtype), experts, torch.rand(tokens, K).to(dtype)


def compare(dtype: str, tokens: list[int], rounds: int, inductor: bool) -> None:
    layer = OlmoeExperts(
        OlmoeConfig(hidden_size=D, intermediate_size=H, num_experts=E, num_experts_per_tok=K)
    )
    layer = layer.to(DTYPES[dtype]).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(std=0.03)
    contenders = [Contender("moec", moec_kernels(layer, dtype)), *transformers_ways(layer)]
    if not inductor:
        contenders = [c for c in contenders if c.name != "inductor"]
    top, stream = peak(dtype), bandwidth()
    print(f"\n{dtype}: {THREADS} threads, {top / 1e9:.0f} GFLOP/s, {stream / 1e9:.1f} GB/s")
    print("tokens" + "".join(f"{c.name:>12}" for c in contenders) + "   ratio  % of limit")
    for t in tokens:
        problem = routing(t, DTYPES[dtype])
        running = [c for c in contenders if t <= c.most_tokens]
        wanted = running[1].run(*problem)  # eager
        for c in running:
            made = c.run(*problem)
            error = (made - wanted).abs().max() / wanted.abs().max()
            assert error < (0.02 if dtype == "bfloat16" else 1e-4), f"{c.name}: {error}"
        times: dict[str, list[float]] = {c.name: [] for c in running}
        for _ in range(rounds):
            for c in running:
                times[c.name].append(timed(partial(c.run, *problem)))
        median = {name: statistics.median(some) for name, some in times.items()}
        other = min(m for name, m in median.items() if name != "moec")
        used = len(set(problem[1].flatten().tolist()))
        weights = used * 3 * D * H * problem[0].element_size()
        limit = max(t * K * 6 * D * H / top, weights / stream)
        cells = "".join(
            f"{median[c.name] * 1e3:12.2f}" if c.name in median else f"{'-':>12}"
            for c in contenders
        )
        ratio, share = other / median["moec"], limit / median["moec"]
        print(f"{t:6}{cells}{ratio:8.2f}{share:11.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-inductor", action="store_true", help="it takes minutes to compile")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\._dynamo")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype in options.dtypes.split(","):
            compare(
                dtype,
                [int(t) for t in options.tokens.split(",")],
                options.rounds,
                not options.no_inductor,
            )


if __name__ == "__main__":
    main()
