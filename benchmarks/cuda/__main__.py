"""Everything that needs a GPU, in one run: results first, then memory errors, then times.

    python -m benchmarks.cuda --dry-run
    python -m benchmarks.cuda --compile-only
    python -m benchmarks.cuda --record benchmarks/results/cuda.jsonl

  1. numbers    one MoE layer of each shape, bf16, against torch eager and grouped_mm
  2. faults     step 1 of the smallest layer under compute-sanitizer (if installed): memcheck,
                racecheck
  3. text       a model of two such layers in float32 against transformers' generate: the tokens,
                and milliseconds per token
  4. times      microseconds of moec, torch eager, grouped_mm, Triton (the products alone, by the
                fastest of four tiles), torch.compile, and cuBLAS (equal products with the same
                FLOPs)
  5. codes      microseconds of the layers with int8, int4, fp8 and mxfp4 experts, after their
                results equal those of the CPU's kernels for the same codes
  6. models     milliseconds of whole models of real size with random weights: a prompt beside
                eager and torch.compile, a token beside transformers' generate

A failed step is reported, and the other steps still run, because time on a GPU is short. A
contender that is not installed is reported and left out. `--compile-only` needs no GPU: it compiles
the kernels of steps 4 to 6 for one architecture, with one layer per model, and runs nothing.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cuda.contenders import block
from benchmarks.cuda.layers import (
    CONTENDERS,
    FORMATS,
    ROUNDS,
    few_bits,
    first_line,
    numbers,
    times,
)
from benchmarks.cuda.models import LONG, MODELS, build, compiled, text, whole
from benchmarks.cuda.shapes import LAYERS, TOKENS, LayerShape
from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.target import cuda, nvidia

NUMBERS, FAULTS, TEXT, TIMES, CODES = "numbers", "faults", "text", "times", "codes"
WHOLE = "models"
KINDS = (NUMBERS, FAULTS, TEXT, TIMES, CODES, WHOLE)
TOOLS = ("memcheck", "racecheck")
SMALLEST = "granite-1b-a400m"
COMPILED = "cuda:sm_90a"
"""The target of --compile-only."""


@dataclass(frozen=True)
class Step:
    """`what` is one of KINDS; `detail` is the name of a layer or a tool."""

    what: str
    detail: str
    tokens: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.what:8} {self.detail:18} T = {', '.join(map(str, self.tokens))}"


def steps(layers: Sequence[str], tokens: Sequence[int], only: Sequence[str]) -> list[Step]:
    """The steps, the most important first."""
    few = tuple(count for count in tokens if count <= 256)
    every = [
        *(Step(NUMBERS, name, few) for name in layers),
        *(Step(FAULTS, tool, (1, 16)) for tool in TOOLS),
        *(Step(TEXT, name, (1,)) for name in layers),
        *(Step(TIMES, name, tuple(tokens)) for name in layers),
        *(Step(CODES, name, tuple(tokens)) for name in layers),
        *(Step(WHOLE, name, (LONG,)) for name in layers if name in MODELS),
    ]
    return [step for step in every if step.what in only]


def lacking(instead: str = "--dry-run lists what it would do") -> str:
    """The reason why nothing can be measured here, and what can be done `instead`, as a sentence;
    empty if it can."""
    driver = nvidia.driver()
    if driver is None or not driver.gpus:
        reason = nvidia.NO_DRIVER if driver is None else "the NVIDIA driver finds no GPU"
        return f"this script measures an NVIDIA GPU, and {reason}; {instead}"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not reach the GPU: install a build for CUDA"
    return ""


def faults(tool: str, tokens: Sequence[int], device: str) -> str:
    """One line: the result of compute-sanitizer on step 1."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "left out: there is no compute-sanitizer on PATH"
    script = [sys.executable, "-m", "benchmarks.cuda", "--only", NUMBERS, "--layers", SMALLEST]
    counts = ["--tokens", ",".join(map(str, tokens)), "--device", device]
    words = [program, "--tool", tool, "--error-exitcode", "3", *script, *counts]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    last = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line]
    return last[-1].strip("= ") if last else f"exit code {result.returncode}"


def perform(step: Step, device: str) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    if step.what == FAULTS:
        print(f"  {faults(step.detail, step.tokens, device)}", flush=True)
        return rows
    if step.what == WHOLE:
        model = build(step.detail)
        for row in whole(model, compiled(model, cuda.KIND), device):
            print("  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append({"model": step.detail, **row})
        return rows
    layer = LAYERS[step.detail]
    if step.what == TEXT:
        print(f"  {text(layer, device, cuda.KIND)}", flush=True)
        return rows
    if step.what == NUMBERS:
        for line in numbers(layer, step.tokens, device, cuda.KIND):
            print(f"  {line}", flush=True)
        return rows
    if step.what == TIMES:
        measured = times(layer, step.tokens, device, cuda.KIND)
    else:
        measured = few_bits(layer, step.tokens, device, cuda.KIND)
    for row in measured:
        print("  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append({"layer": step.detail, **row})
    return rows


def compilations(layers: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of each compilation, and a function that does it."""
    import torch

    import moec

    def layer(shape: LayerShape, format: str | None) -> Any:
        x = torch.zeros(1, 7, shape.width, dtype=torch.bfloat16)
        options = {} if format is None else {"quant": format}
        return moec.compile(block(shape), (x,), target=COMPILED, verify=False, **options)

    for name in layers:
        for format in (None, *FORMATS):
            yield f"{name} {format or 'bf16'}", partial(layer, LAYERS[name], format)
        if name in MODELS:
            yield (
                f"{name} model",
                lambda name=name: compiled(build(name, num_hidden_layers=1), COMPILED),
            )


def compile_all(layers: Sequence[str]) -> None:
    """Prints a line per compilation. Raises SystemExit at the end if one failed."""
    failures = 0
    for name, compilation in compilations(layers):
        start = time.perf_counter()
        try:
            gpu = compilation().package.gpu
        except Exception as error:
            failures += 1
            print(f"{name}: failed: {type(error).__name__}: {first_line(error)}", flush=True)
            continue
        kernels = len(gpu.launches[cuda.TARGETS[COMPILED].arch])
        size = sum(map(len, gpu.parts.values()))
        seconds = time.perf_counter() - start
        print(f"{name}: {kernels} kernels, {size / 1e3:.0f} kB, {seconds:.1f} s", flush=True)
    if failures:
        raise SystemExit(f"{failures} compilations failed")


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="list the steps, do nothing")
    compile_help = f"compile all kernels for {COMPILED}, without a GPU, and run nothing"
    parser.add_argument("--compile-only", action="store_true", help=compile_help)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--only", default=",".join(KINDS))
    driver = nvidia.driver()
    add_record_options(parser, driver.gpus[0].name if driver and driver.gpus else "no GPU")
    options = parser.parse_args(words)
    for name in options.layers.split(","):
        if name not in LAYERS:
            parser.error(f"there is no layer {name!r}: give some of {', '.join(LAYERS)}")
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = parsed(words)
    tokens = [int(count) for count in options.tokens.split(",")]
    todo = steps(options.layers.split(","), tokens, options.only.split(","))
    if options.dry_run:
        for step in todo:
            print(step)
        print(f"{len(todo)} steps; times beside {', '.join(CONTENDERS[1:])}, of bf16 experts")
        print(f"experts of few bits: {', '.join(FORMATS)}")
        return
    if options.compile_only:
        compile_all(options.layers.split(","))
        return
    if reason := lacking():
        raise SystemExit(reason)
    rows: dict[str, list[dict[str, Cell]]] = {kind: [] for kind in KINDS}
    for step in todo:
        print(step, flush=True)
        try:
            rows[step.what] += perform(step, options.device)
        except Exception as error:
            print(f"  failed: {type(error).__name__}: {error}", flush=True)
    for kind, claim, case in (
        (TIMES, "cuda-layers", "bf16"),
        (CODES, "cuda-layers", "few bits"),
        (WHOLE, "cuda-models", "bf16"),
    ):
        if rows[kind]:
            record_if_asked(options, claim, case, rows[kind], f"one run, median of {ROUNDS} calls")


if __name__ == "__main__":
    main()
