"""Compressed experts: bytes, encoding time, and products with cold weights against moec's own bf16.

    python -m benchmarks.layers.ternary [--shapes 768x3072,…] [--tokens 1]
                                 [--target cpu]

Weights are independent, and 88.5 % of them are zero, as QMoE's dictionary assumes (two-bit codes
are uniform). A row (or --tokens rows) goes to one expert after the other, of so many experts that
they exceed twice the last-level cache: no weights are cached, as during generation. Both kernels
take turns in one process; the script prints medians, also of the ratio. Bytes of ternary weights
include the start and the two bf16 numbers of each row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moec.runtime.process.threads import set_threads

THREADS = set_threads()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tvm  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.records import Cell, add_record_options, record_if_asked  # noqa: E402
from moec.arguments import target_of  # noqa: E402
from moec.codegen.build import compile_kernels  # noqa: E402
from moec.codegen.cpu.compressed.grouped import compressed_linear  # noqa: E402
from moec.codegen.cpu.compressed.weights import table  # noqa: E402
from moec.codegen.cpu.gemm.layout import Layout  # noqa: E402
from moec.codegen.cpu.gemm.linear import grouped_linear  # noqa: E402
from moec.codegen.cpu.gemm.pack import pack  # noqa: E402
from moec.codegen.cpu.quantised.layout import PAIRS  # noqa: E402
from moec.codegen.cpu.quantised.round_rows import round_rows  # noqa: E402
from moec.codegen.specs.products import CompressedSpec, LinearSpec  # noqa: E402
from moec.ir.formats.compressed import compress, decompress, nbytes  # noqa: E402
from moec.ir.formats.ternary import bytes_of_counts, decode, encode, pack_starts, unpack_starts  # noqa: E402
from moec.ir.formats.ternary_code import ZEROS, dictionary  # noqa: E402
from moec.target.cpu import CpuTarget, processor  # noqa: E402

SHAPES = "768x3072,3072x768,1024x4096,4096x1024,2080x6144,6144x2080"
COLD = 2  # times the last-level cache
DISTINCT = 4  # experts whose weights differ


def cache_bytes() -> int:
    """The size of the last-level cache of this machine, in bytes."""
    result = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(result.read_text().strip().removesuffix("K")) * 1024 if result.exists() else 32 << 20


def source(experts: int, n: int, k: int) -> Tensor:
    rest = (1 - ZEROS) / 2
    drawn = torch.rand(experts, n, k)
    return (drawn >= ZEROS).to(torch.uint8) + (drawn >= ZEROS + rest).to(torch.uint8)


def built(target: CpuTarget, kernel: Any) -> Callable[..., None]:
    result = bound(target, kernel)
    return lambda *tensors: result(*(tvm.runtime.from_dlpack(t) for t in tensors))


def bound(target: CpuTarget, kernel: Any) -> Any:
    return compile_kernels(kernel, target=target)[str(kernel.attrs["global_symbol"])]


def repeated(parts: tuple[Tensor, ...], times: int) -> list[Tensor]:
    """`times` copies of the parts of a stack: equal weights in separate memory."""
    stream, starts, grid = parts
    counts = np.diff(unpack_starts(starts, grid.shape[0] * grid.shape[1]))
    moved = pack_starts(np.cumsum([0, *np.tile(counts, times)]))
    return [stream.repeat(times), moved, grid.repeat(times, 1, 1)]


def product(target: CpuTarget, n: int, k: int, tokens: int, rounds: int) -> dict[str, Cell]:
    """Prints the line of one shape, and returns it."""
    codes = source(DISTINCT, n, k)
    grid = torch.stack([-torch.rand(DISTINCT, n), torch.rand(DISTINCT, n)], -1).bfloat16()
    parts = compress(codes, grid)
    size = nbytes(parts) / DISTINCT
    ratio = 2 * n * k / size
    experts = -(-COLD * cache_bytes() // (2 * n * k * DISTINCT)) * DISTINCT
    stack = repeated(parts, experts // DISTINCT)
    stacks = -(-int(COLD * cache_bytes()) // int(size * experts))
    counts = (bytes_of_counts(parts[1].shape),)
    spec = CompressedSpec(n, k, "", "float32", groups=experts, bytes_of_counts=counts)
    few = bound(target, compressed_linear(target, spec))
    wide = LinearSpec(n, k, "bfloat16", "float32", groups=experts)
    dense = bound(target, grouped_linear(target, wide))
    weight = decompress(parts, k)
    one = pack(Layout(replace(wide, groups=1), target), weight[:1].bfloat16())
    packed = torch.from_numpy(one).repeat(experts, 1, 1, 1)

    x = torch.randn(tokens, k)
    rows = [torch.zeros(tokens, PAIRS.words(k), dtype=torch.int32), torch.zeros(tokens, 1)]
    rows.append(torch.zeros(tokens, 1, dtype=torch.int32))
    built(target, round_rows(target, k, 1, "float32", form=PAIRS))(x, *rows)
    y, z = torch.zeros(tokens, n), torch.zeros(tokens, n)
    entries = [torch.from_numpy(table(target)).clone()]

    def bind(*tensors: Tensor) -> list[Any]:
        return [tvm.runtime.from_dlpack(t) for t in tensors]

    held = bind(*entries)
    first, result = bind(*rows), bind(y)
    copies = [bind(*(t.clone() for t in stack)) for _ in range(stacks)]
    held_wide, (wide_x,) = bind(packed, z), bind(x.bfloat16())
    ends = bind(*((tokens * (torch.arange(experts) >= e)).int() for e in range(experts)))
    ways: tuple[tuple[Callable[..., None], list[Any]], ...] = (
        (
            lambda end, copy: few(*first, end, *held, *copy, *result),
            [(end, copy) for copy in copies for end in ends],
        ),
        (lambda end: dense(wide_x, end, *held_wide), [(end,) for end in ends]),
    )
    ways[0][0](*ways[0][1][0])
    expected = x.double() @ weight[0].double().T
    off = float((y - expected).norm() / expected.norm())
    if off > 1e-4:
        raise SystemExit(f"ternary {n}x{k}: the product is {off:.1e} off")
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for way, (run, calls) in enumerate(ways):
            run(*calls[-1])  # wakes the threads
            begin = time.perf_counter()
            for call in calls:
                run(*call)
            seconds[way].append((time.perf_counter() - begin) / len(calls))
    a, b = (statistics.median(finite) * 1e6 for finite in seconds)
    each = statistics.median(p / q for p, q in zip(*seconds, strict=True))
    speed = 2 * n * k / b / 1e3
    print(
        f"{'ternary':8}{n:>5} x {k:<5}{ratio:7.2f}x{a:11.1f}{b:10.1f}{each:8.2f}"
        f"{size / a / 1e3:10.1f}{speed:10.1f}",
        flush=True,
    )
    return {
        "kind": "ternary",
        "matrix": f"{n} x {k}",
        "times smaller": round(ratio, 2),
        "µs": round(a, 1),
        "bf16 µs": round(b, 1),
        "ratio": round(each, 2),
        "GB/s": round(size / a / 1e3, 1),
        "bf16 GB/s": round(speed, 1),
    }


def encoding(millions: int = 100) -> None:
    dictionary()
    warm = encode(source(1, 64, 64)[0])
    decode(warm, 64, 64)  # numba compiles
    codes = source(1, millions * 250, 4000)[0]
    begin = time.perf_counter()
    encoded = encode(codes)
    middle = time.perf_counter()
    back = decode(encoded, len(codes), 4000)
    end = time.perf_counter()
    exact = "bit-exact" if torch.equal(back, codes) else "WRONG"
    print(
        f"{millions} M weights: encoded in {middle - begin:.2f} s, decoded in {end - middle:.2f} s "
        f"({exact}), {codes.numel() * 2 / (encoded.nbytes + 4 * len(codes)):.2f} times smaller "
        f"than bf16, {8 * encoded.nbytes / codes.numel():.3f} bits a weight\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", type=int, default=1, help="rows that meet each expert")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", default="cpu", help="of both kernels")
    add_record_options(parser, processor())
    options = parser.parse_args()
    target = target_of(options.target, run=True)
    torch.manual_seed(0)
    conditions = (
        f"{THREADS} threads, {target.name}, last-level cache {cache_bytes() >> 20} MiB, load "
        f"average before {os.getloadavg()[0]:.1f}"
    )
    print(f"{Path(__file__).name}: {conditions}")
    rows: list[dict[str, Cell]] = []
    encoding()
    print("kind     rows   wide  smaller  its µs   bf16 µs   ratio      GB/s bf16 GB/s")
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        rows.append(product(target, n, k, options.tokens, options.rounds))
    count = "one row" if options.tokens == 1 else f"{options.tokens} rows"
    target_named = "" if options.target == "cpu" else f", --target {options.target}"
    case = f"{count} by one expert{target_named}"
    record_if_asked(options, "compressed-kernels", case, rows, conditions)


if __name__ == "__main__":
    main()
