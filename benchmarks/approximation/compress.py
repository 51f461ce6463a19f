"""The cost of compressing trained experts: bits per weight, and perplexity on held-out text.

    python -m benchmarks.approximation.compress [--models tiny_moe,switch,smollm2] [--tokens 4096]
        [--folder FOLDER] [--append FILE.md]

tiny_moe is examples/tiny_moe. switch is the Switch Transformer of benchmarks/models/switch.py
(trained if --folder has none). smollm2 is the upcycled model of benchmarks/models/upcycle.py: four
of its 30 layers have experts, trained to reproduce the dense MLPs. Experts are fitted on --tokens
tokens of Python's standard library, those of every layer on its inputs in the original model.
Perplexity is measured on --windows windows of files that no model was trained on here. "left" is
the loss in nats, as a share of the loss by rounding to nearest. The ways are options of
compress-experts: "gptq alone" is GPTQ, with numbers fitted to its codes; "gptq" continues with
coordinate descent; "tuned" is followed by tune-grids.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.approximation.curves import CHECKPOINT, HELD_OUT, recognised, windows
from benchmarks.approximation.printed import Say, add_append_option, printed
from benchmarks.models.smollm2 import load
from benchmarks.models.switch import FOLDER, trained
from benchmarks.models.upcycle import EXPERTS, LAYERS, K, upcycle
from moec.ir.graph import Program
from moec.ir.stats import stored_bytes
from moec.passes.approximate.compress_experts import CompressExperts
from moec.passes.approximate.training.tune_grids import TuneGrids
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.core.moe_layer import constant, layer_of
from moec.passes.core.runner import Log

FITTED_ON = ("argparse.py", "typing.py", "pathlib.py", "ast.py", "dataclasses.py", "shutil.py",
             "email/message.py", "xml/dom/minidom.py", "tarfile.py", "inspect.py", "pickle.py",
             "zipfile.py")  # fmt: skip
LENGTH = 256
BITS = {"f32": 32, "bf16": 16}


@dataclass(frozen=True)
class Case:
    """A model with its blocks recognised, its tokenizer, and notes for the table."""

    program: Program
    tokenizer: Any
    notes: str = ""


def tiny_moe(_: Path) -> Case:
    return Case(recognised(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT))


def switch(folder: Path) -> Case:
    model, example = trained(folder), torch.zeros(2, LENGTH, dtype=torch.int64)
    return Case(recognised(model, (example,)), AutoTokenizer.from_pretrained(CHECKPOINT))


def smollm2(_: Path) -> Case:
    model, tokenizer = load()
    errors = upcycle(model, tokenizer)
    notes = (
        f"layers {', '.join(map(str, LAYERS))} of 30 with {EXPERTS} experts, top-{K}, which miss "
        f"the dense MLP's output by {', '.join(f'{error:.2f}' for error in errors)}"
    )
    example = torch.zeros(2, LENGTH, dtype=torch.int64)
    return Case(recognised(model, (example,)), tokenizer, notes)


MODELS: dict[str, Callable[[Path], Case]] = {
    "tiny_moe": tiny_moe,
    "switch": switch,
    "smollm2": smollm2,
}


def ways(reach: float, steps: int) -> dict[str, tuple[CompressExperts, int]]:
    """By name: the pass, and the number of steps of tune-grids after it."""
    result = {
        "nearest": (CompressExperts(by="nearest"), 0),
        "gptq alone": (CompressExperts(rounds=0), 0),
        "gptq": (CompressExperts(), 0),
    }
    if steps:
        result["gptq, tuned"] = (CompressExperts(), steps)
    further = CompressExperts(reach=reach)
    result[f"reach {reach:g}"] = (further, 0)
    if steps:
        result[f"reach {reach:g}, tuned"] = (further, steps)
    return result


def measure(name: str, options: argparse.Namespace, say: Say) -> None:
    case = MODELS[name](options.folder)
    program, graph, notes = case.program, case.program.graph, case.notes
    fitted_on = windows(case.tokenizer, FITTED_ON, options.tokens // LENGTH, LENGTH)
    held_out = windows(case.tokenizer, HELD_OUT, options.windows, LENGTH)
    layers = [layer_of(graph, op) for op in graph.ops if op.name == "moe.experts"]
    chooser = Evaluator(program, load_calibration(fitted_on, program, {}))
    observed = list(zip(layers, chooser.layer_stats(program, layers), strict=True))
    evaluator = Evaluator(program, load_calibration(held_out, program, {}))
    stacks = [stack for layer in layers for stack in layer.stacks]
    weights = sum(math.prod(map(int, stack.shape)) for stack in stacks)
    before, full = evaluator.origin.perplexity, stored_bytes(program)
    bits = BITS[stacks[0].dtype]
    assert before is not None
    shapes = {tuple(map(int, stack.shape[1:])) for stack in stacks}
    say(f"{name}: {len(layers)} layers of {layers[0].count} experts, matrices of "
        f"{', '.join(f'{n} x {k}' for n, k in sorted(shapes))}{notes and '; '}{notes}")  # fmt: skip
    say(
        f"fitted on {fitted_on['input_ids'].numel()} tokens, perplexity of "
        f"{evaluator.calibration.tokens} of {', '.join(HELD_OUT)}: {before:.2f}"
    )
    counts = torch.cat([stats.usage(layer.count) for layer, stats in observed]).sort().values
    say(f"rows of an expert: {counts[0]} to {counts[-1]}, {counts[len(counts) // 2]} in the middle")
    say(f"{'':26}{'bits a weight':>14}{'zeros':>7}{'perplexity':>12}{'nats lost':>11}{'left':>6}")
    rounded, fitted = math.nan, dict[CompressExperts, Program]()
    for way, (pass_, steps) in ways(options.reach, options.steps).items():
        if pass_ not in fitted:
            result = program
            for layer, stats in observed:
                result = pass_.change(result, layer, stats).program
            fitted[pass_] = result
        result = tuned(fitted[pass_], chooser, steps) if steps else fitted[pass_]
        after = evaluator.measure(result)[0].perplexity
        assert after is not None
        lost = math.log(after / before)
        rounded = lost if way == "nearest" else rounded
        private = bits - 8 * (full - stored_bytes(result)) / weights
        left = "" if way == "nearest" else f"{lost / rounded:6.0%}"
        say(
            f"{f'ternary, {way}':26}{private:14.2f}{zeros(result):7.0%}{after:12.2f}"
            f"{lost:11.3f}{left}"
        )
    say("")


def tuned(program: Program, evaluator: Evaluator, steps: int) -> Program:
    pass_ = TuneGrids(steps=steps)
    for layer, grids in zip(*pass_.observe(program, evaluator, Log()), strict=True):
        program = pass_.change(program, layer, grids).program
    return program


def zeros(program: Program) -> float:
    """The share of the compressed weights that are 0."""
    stacks = [
        constant(program, op.outputs[0]) for op in program.graph.ops if op.name == "moe.decompress"
    ]
    return sum(int((s == 0).sum()) for s in stacks) / sum(s.numel() for s in stacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny_moe,smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens that are held out")
    parser.add_argument("--reach", type=float, default=0.7, help="of the ternary grid's second try")
    parser.add_argument("--steps", type=int, default=200, help="of tune-grids; 0 leaves it out")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of switch's checkpoint")
    add_append_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    title = "Compressed experts of trained models: bits and nats lost"
    with printed(title, "benchmarks.approximation.compress", options.append) as say:
        for name in options.models.split(","):
            measure(name, options, say)


if __name__ == "__main__":
    main()
