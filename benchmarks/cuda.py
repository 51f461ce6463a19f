"""Everything that needs a GPU, in one run: results first, then memory errors, then times.

    python -m benchmarks.cuda --dry-run
    python -m benchmarks.cuda --record benchmarks/results/cuda.jsonl

  1. numbers    one MoE layer of each shape, bf16, against torch eager and grouped_mm
  2. faults     step 1 of the smallest layer under compute-sanitizer (if installed): memcheck,
                racecheck
  3. text       a model of two such layers in float32 against transformers' generate: the tokens,
                and milliseconds per token
  4. times      microseconds of moec, torch eager, grouped_mm, torch.compile, and cuBLAS (equal
                products with the same FLOPs); the share of the roofline, which needs no GPU
  5. codes      microseconds of the layers with int8, int4 and mxfp4 experts, after their results
                equal those of the CPU's kernels for the same codes

A failed step is reported, and the other steps still run, because time on a GPU is short.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

from benchmarks.records import Cell, add_record_options, record_if_asked
from moec.bench.gpu_model import LAYERS, TOKENS
from moec.codegen.cuda.roofline import LayerShape, layer_seconds
from moec.target import cuda, nvidia

NUMBERS, FAULTS, TEXT, TIMES, CODES = "numbers", "faults", "text", "times", "codes"
KINDS = (NUMBERS, FAULTS, TEXT, TIMES, CODES)
FORMATS = ("int8", "int4:32", "mxfp4")
TOOLS = ("memcheck", "racecheck")
TOLERANCE = 2e-2  # of the greatest element: eager rounds bf16 rows after each product
ROUNDS, CONTENDERS = 20, ("moec", "eager", "grouped_mm", "inductor", "cublas")
SMALLEST = "granite-1b-a400m"
PROMPT, NEW = 8, 32  # tokens


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
    ]
    return [step for step in every if step.what in only]


def lacking() -> str:
    """The reason why nothing can be measured here, as a sentence; empty if it can."""
    driver = nvidia.driver()
    if driver is None or not driver.gpus:
        reason = nvidia.NO_DRIVER if driver is None else "the NVIDIA driver finds no GPU"
        return f"this script measures an NVIDIA GPU, and {reason}; --dry-run lists what it would do"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not reach the GPU: install a build for CUDA"
    return ""


# ---- contenders ---------------------------------------------------------------------------

Run = Callable[[Any], Any]  # x[1, T, D] -> [1, T, D]


def block(layer: LayerShape) -> Any:
    """OLMoE's block in this shape: softmax, top-k, SwiGLU; random weights in bf16."""
    import torch
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=layer.width,
        intermediate_size=layer.hidden,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )
    torch.manual_seed(0)
    module = OlmoeSparseMoeBlock(config).to(torch.bfloat16).requires_grad_(False).eval()
    for weight in module.parameters():
        weight.normal_(std=0.03)
    return module


def with_experts(module: Any, implementation: str) -> Any:
    """The module with the same weights, and its experts by one of transformers' implementations."""
    import copy

    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    experts = copy.copy(module.experts)
    experts.config = copy.deepcopy(experts.config)
    experts.config._experts_implementation = implementation
    twin._modules["experts"] = experts
    return twin


@cache
def subject(layer: LayerShape, device: str, target: str) -> tuple[Any, Run]:
    """The block, and moec's code for any number of tokens, compiled once for all steps."""
    import torch

    import moec

    module = block(layer)
    x = torch.randn(1, 7, layer.width, dtype=torch.bfloat16)
    run = moec.compile(module, (x,), target=target, verify=False)
    return module.to(device), run


def equal_products(layer: LayerShape, tokens: int, device: str) -> Run:
    """cuBLAS with the same FLOPs: the rows are split evenly over all active experts."""
    import torch

    active = round(layer.active(tokens))
    rows = max(1, tokens * layer.top_k // active)
    up = torch.randn(active, layer.width, 2 * layer.hidden, dtype=torch.bfloat16, device=device)
    down = torch.randn(active, layer.hidden, layer.width, dtype=torch.bfloat16, device=device)
    x = torch.randn(active, rows, layer.width, dtype=torch.bfloat16, device=device)

    def run(_: Any) -> Any:
        gate, value = torch.bmm(x, up).chunk(2, dim=-1)
        return torch.bmm(torch.nn.functional.silu(gate) * value, down)

    return run


# ---- measurements -------------------------------------------------------------------------


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
        text = ", ".join(f"{share:.1%} of rows differ from {n}" for n, share in shares.items())
        yield f"T = {count}: {text}"
        if max(shares.values()) > 0.01:
            raise SystemExit("the kernels are wrong: no time of them counts")


def times(
    layer: LayerShape,
    tokens: Sequence[int],
    device: str,
    target: str,
    limit: cuda.CudaTarget,
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
            "inductor": lambda: torch.compile(with_experts(module, "grouped_mm"), dynamic=False),
            "cublas": lambda count=count: equal_products(layer, count, device),
        }
        row: dict[str, Cell] = {"tokens": count}
        for name in names:
            try:
                row[name] = round(microseconds(ways[name](), x, device), 1)
            except Exception as error:  # a failing contender must not stop the others
                print(f"  {name} failed: {str(error).splitlines()[0] if str(error) else error!r}")
        row["limit"] = round(layer_seconds(layer, count, limit) * 1e6, 1)
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


def text(layer: LayerShape, device: str, target: str, new: int = NEW) -> str:
    """One line: milliseconds per token. Raises SystemExit if tokens differ from transformers'."""
    import numpy as np
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    import moec

    heads = max(1, layer.width // 128)
    config = OlmoeConfig(
        hidden_size=layer.width,
        intermediate_size=layer.hidden,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1024,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).requires_grad_(False).eval()
    ids = torch.randint(0, 1024, (1, PROMPT))
    run = moec.compile(model, kwargs={"input_ids": ids}, target=target, verify=False)
    model = model.to(device)
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ways: dict[str, Callable[[], Any]] = {
        "moec": lambda: run.generate(ids.numpy(), max_new_tokens=new, stop=()),
        "transformers": lambda: model.generate(ids.to(device), **options).cpu().numpy(),
    }
    tokens, milliseconds = {}, {}
    for name, way in ways.items():
        tokens[name] = way()
        start = time.perf_counter()
        way()
        milliseconds[name] = (time.perf_counter() - start) * 1e3 / new
    if not np.array_equal(*tokens.values()):
        raise SystemExit("the kernels are wrong: the tokens differ from those of transformers")
    return ", ".join(f"{name} {each:.2f} ms a token" for name, each in milliseconds.items())


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


def perform(step: Step, device: str, limit: cuda.CudaTarget) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    if step.what == FAULTS:
        print(f"  {faults(step.detail, step.tokens, device)}", flush=True)
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
        measured = times(layer, step.tokens, device, cuda.KIND, limit)
    else:
        measured = few_bits(layer, step.tokens, device, cuda.KIND)
    for row in measured:
        print("  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append({"layer": step.detail, **row})
    return rows


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="list the steps, do nothing")
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
    if reason := lacking():
        raise SystemExit(reason)
    limit = cuda.parse(cuda.KIND)
    rows: dict[str, list[dict[str, Cell]]] = {kind: [] for kind in KINDS}
    for step in todo:
        print(step, flush=True)
        try:
            rows[step.what] += perform(step, options.device, limit)
        except Exception as error:
            print(f"  failed: {type(error).__name__}: {error}", flush=True)
    for kind, case in ((TIMES, "bf16"), (CODES, "few bits")):
        if rows[kind]:
            record_if_asked(options, "cuda-layers", case, rows[kind], "one run, median of 20 calls")


if __name__ == "__main__":
    main()
