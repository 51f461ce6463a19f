"""Results and times of one MoE layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.cuda.contenders import (
    Run,
    block,
    equal_products,
    subject,
    triton_products,
    vllm_products,
    with_experts,
)
from benchmarks.cuda.shapes import LayerShape
from benchmarks.records import Cell

FORMATS = ("int8", "int4:32", "fp8:128", "mxfp4")
TOLERANCE = 2e-2  # of the greatest element: eager rounds bf16 rows after each product
ROUNDS = 20
CONTENDERS = ("moec", "eager", "grouped_mm", "triton", "inductor", "cublas")


def difference(run: Run, reference: Run, x: Any, device: str | None = None) -> float:
    """The share of rows of y[T, D] that differ by more than TOLERANCE of the greatest element: in
    16 bits, nearly equal scores may choose other experts. `run` gets x on `device`, if named."""
    here = x if device is None else x.to(device)
    result, expected = run(here).to(x.device).float(), reference(x).float()
    rows = (result - expected).abs().flatten(0, -2).amax(-1)
    return float((rows > TOLERANCE * expected.abs().max()).float().mean())


def microseconds(run: Run, x: Any, device: str) -> float:
    """The median of ROUNDS calls, after three warm-up calls."""
    import torch

    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed() -> float:
        start = clock()
        run(x)
        return clock() - start

    for _ in range(3):
        run(x)
    return median(timed() for _ in range(ROUNDS)) * 1e6


def numbers(layer: LayerShape, tokens: Sequence[int], device: str, target: str) -> Iterator[str]:
    """One line per number of tokens. Raises SystemExit if a row is wrong."""
    import torch

    module, run = subject(layer, device, target)
    for count in tokens:
        x = torch.randn(1, count, layer.width, dtype=torch.bfloat16).to(device)
        shares = {
            name: difference(run, with_experts(module, name), x) for name in ("eager", "grouped_mm")
        }
        others = triton_differences(module, x)
        shares |= others
        text = ", ".join(f"{share:.1%} of rows differ from {n}" for n, share in shares.items())
        yield f"T = {count}: {text}{'' if others else '; there is no Triton'}"
        if max(shares.values()) > 0.01:
            raise SystemExit("the kernels are wrong: no time of them counts")


def triton_differences(module: Any, x: Any) -> dict[str, float]:
    """The greatest share of rows that differ, of all tiles; nothing where there is no Triton."""
    try:
        runs = triton_products(module, x)
    except ImportError:
        return {}
    eager = with_experts(module, "eager")
    return {"triton": max(difference(run, eager, x) for run in runs.values())}


def fastest_triton(module: Any, x: Any, device: str) -> Run:
    """By the tile that takes the least time for these rows."""
    runs = triton_products(module, x).values()
    return min(runs, key=lambda run: microseconds(run, x, device))


def milliseconds(ways: Mapping[str, Run], x: Any, device: str) -> dict[str, Cell]:
    """By name. Ways that fail are left out and reported."""
    row: dict[str, Cell] = {}
    for name, run in ways.items():
        try:
            row[name] = round(microseconds(run, x, device) / 1e3, 3)
        except Exception as error:
            print(f"  {name} failed: {first_line(error)}")
    return row


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def times(
    layer: LayerShape,
    tokens: Sequence[int],
    device: str,
    target: str,
    names: Sequence[str] = CONTENDERS,
) -> Iterator[dict[str, Cell]]:
    """One row per number of tokens, in microseconds. Contenders that fail are left out and
    reported."""
    import torch

    module, run = subject(layer, device, target)
    for count in tokens:
        x = torch.randn(1, count, layer.width, dtype=torch.bfloat16).to(device)
        ways: dict[str, Callable[[], Run]] = {
            "moec": lambda: run,
            "eager": lambda: with_experts(module, "eager"),
            "grouped_mm": lambda: with_experts(module, "grouped_mm"),
            "triton": lambda x=x: fastest_triton(module, x, device),
            "vllm": lambda x=x: vllm_products(module, x),
            "inductor": lambda: torch.compile(with_experts(module, "grouped_mm"), dynamic=False),
            "cublas": lambda count=count: equal_products(layer, count, device),
        }
        row: dict[str, Cell] = {"tokens": count}
        for name in names:
            try:
                row[name] = round(microseconds(ways[name](), x, device), 1)
            except Exception as error:  # a failing contender must not stop the others
                print(f"  {name} failed: {first_line(error)}")
        yield row


def few_bits(
    layer: LayerShape,
    tokens: Sequence[int],
    device: str,
    target: str,
    formats: Sequence[str] = FORMATS,
) -> Iterator[dict[str, Cell]]:
    """One row per number of tokens: microseconds by format of the experts. Raises SystemExit if a
    row differs from that of the CPU's kernels for the same codes."""
    import torch

    import moec

    module, x = block(layer), torch.randn(1, 7, layer.width, dtype=torch.bfloat16)

    def compiled(format: str, where: str) -> Run:
        return moec.compile(module, (x,), target=where, quant=format, verify=False)

    runs = {format: compiled(format, target) for format in formats}
    for format in formats:
        if error := difference(runs[format], compiled(format, "cpu"), x, device):
            raise SystemExit(f"the kernels of {format} are wrong: {error:.1%} of rows differ")
    for count in tokens:
        rows = torch.randn(1, count, layer.width, dtype=torch.bfloat16).to(device)
        row: dict[str, Cell] = {"tokens": count}
        row |= {format: round(microseconds(run, rows, device), 1) for format, run in runs.items()}
        yield row
