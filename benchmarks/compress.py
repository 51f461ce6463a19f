"""What compressing trained experts costs: bits a weight, and perplexity of text not fitted to.

    python benchmarks/compress.py [--models tiny_moe,smollm2] [--tokens 4096]
                                  [--append benchmarks/RESULTS.md]

tiny_moe is examples/tiny_moe, smollm2 the upcycled model of benchmarks/upcycle.py: four of its 30
layers have experts, trained to give what the dense MLPs gave. Experts are fitted on --tokens tokens
of Python's standard library, those of all layers on what they see in the model as it was;
perplexity is that of files that neither model was trained on here. "left" is the share of what
rounding to nearest loses, in nats, that the fitted weights lose too.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import textwrap
from datetime import date
from pathlib import Path

import torch
from curves import CHECKPOINT, HELD_OUT, Say, Tokens, recognised, windows
from transformers import AutoTokenizer
from upcycle import EXPERTS, LAYERS, K, dense, upcycle

from moec.calibration import calibration
from moec.compression import KINDS
from moec.cost import stored_bytes
from moec.ir import Program
from moec.meter import Meter
from moec.passes.compress_experts import CompressExperts
from moec.passes.layer import layer_of

FITTED_ON = ("argparse.py", "typing.py", "pathlib.py", "ast.py", "dataclasses.py", "shutil.py",
             "email/message.py", "xml/dom/minidom.py", "tarfile.py", "inspect.py", "pickle.py",
             "zipfile.py")  # fmt: skip
LENGTH = 256
BITS = {"f32": 32, "bf16": 16}


def tiny_moe(tokens: int) -> tuple[Program, Tokens, Tokens, str]:
    """The program, what it is fitted on, what it is measured on, and what there is to say."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    fitted_on = windows(tokenizer, FITTED_ON, tokens // LENGTH, LENGTH)
    return recognised(CHECKPOINT), fitted_on, windows(tokenizer, HELD_OUT, 8, LENGTH), ""


def smollm2(tokens: int) -> tuple[Program, Tokens, Tokens, str]:
    model, tokenizer = dense()
    fitted_on = windows(tokenizer, FITTED_ON, tokens // LENGTH, LENGTH)
    errors = upcycle(model, tokenizer)
    notes = (
        f"layers {', '.join(map(str, LAYERS))} of 30 with {EXPERTS} experts, top-{K}, which miss "
        f"the dense MLP's output by {', '.join(f'{error:.2f}' for error in errors)}"
    )
    program = recognised(model, (fitted_on["input_ids"][:2],))
    return program, fitted_on, windows(tokenizer, HELD_OUT, 2, LENGTH), notes


MODELS = {"tiny_moe": tiny_moe, "smollm2": smollm2}


def measure(name: str, tokens: int, say: Say) -> None:
    program, fitted_on, held_out, notes = MODELS[name](tokens)
    graph = program.graph
    layers = [layer_of(graph, op) for op in graph.ops if op.name == "moe.experts"]
    chooser = Meter(program, calibration(fitted_on, program, {}))
    observed = list(zip(layers, chooser.seen(program, layers), strict=True))
    meter = Meter(program, calibration(held_out, program, {}))
    stacks = [stack for layer in layers for stack in layer.stacks]
    weights = sum(math.prod(map(int, stack.shape)) for stack in stacks)
    before, whole = meter.origin.perplexity, stored_bytes(program)
    bits = BITS[stacks[0].dtype]
    assert before is not None
    shapes = {tuple(map(int, stack.shape[1:])) for stack in stacks}
    say(f"{name}: {len(layers)} layers of {layers[0].count} experts, matrices of "
        f"{', '.join(f'{n} x {k}' for n, k in sorted(shapes))}{notes and '; '}{notes}")  # fmt: skip
    say(
        f"fitted on {fitted_on['input_ids'].numel()} tokens, perplexity of "
        f"{meter.calibration.tokens} of {', '.join(HELD_OUT)}: {before:.2f}"
    )
    say(f"{'':18}{'bits a weight':>14}{'perplexity':>12}{'nats lost':>11}{'left':>7}")
    for kind in KINDS:
        rounded = math.nan
        for by in ("nearest", "gptq"):
            pass_, made = CompressExperts(kind=kind, by=by), program
            for layer, seen in observed:
                made = pass_.change(made, layer, seen).program
            after = meter.measure(made)[0].perplexity
            assert after is not None
            lost = math.log(after / before)
            rounded = lost if by == "nearest" else rounded
            own = bits - 8 * (whole - stored_bytes(made)) / weights
            left = "" if by == "nearest" else f"{lost / rounded:7.0%}"
            say(f"{f'{kind}, {by}':18}{own:14.2f}{after:12.2f}{lost:11.3f}{left}")
    say("")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny_moe,smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--append", type=Path, help="add what is printed to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    said: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        said.append(line)

    say(f"one thread, torch {torch.__version__}, load average before: {os.getloadavg()[0]:.1f}")
    for name in options.models.split(","):
        measure(name, options.tokens, say)
    if options.append is None:
        return
    words = [w for w in sys.argv[1:] if w not in ("--append", str(options.append))]
    command = shlex.join(["python", "benchmarks/compress.py", *words])
    body = textwrap.indent("\n".join(said).rstrip(), "    ", lambda line: bool(line.strip()))
    with options.append.open("a", encoding="utf-8") as file:
        file.write(
            "\n## Compressed experts of trained models: bits and nats lost\n\n"
            f"{date.today()}\n\n    $ {command}\n{body}\n"
        )


if __name__ == "__main__":
    main()
