"""Experts in less than a byte, and in less than two bits, per weight: memory and perplexity.

    python examples/08_compress.py [FILE.png]     the picture needs matplotlib

The text is Python's standard library. Weights are fitted on files that the model was trained on;
perplexity is measured on files that it was not trained on. The experts of this model are 256 x 128,
so a row's start and its two numbers take a third of the space of its codewords, and fewer of its
weights are zero. Models as large as those of QMoE, whose format this is, have longer rows with 88 %
zeros, and take 0.8 bits per weight (benchmarks/layers/ternary.py).
"""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

import moec
from moec.ir.graph import Program, Stage
from moec.ir.stats import stored_bytes
from moec.passes.approximate.compress_experts import CompressExperts
from moec.passes.calibration.data import load_calibration
from moec.passes.calibration.evaluator import Evaluator
from moec.passes.calibration.session import CalibrationSession, MeasuredPass
from moec.passes.core.runner import run

CHECKPOINT = Path(__file__).resolve().parent / "tiny_moe" / "checkpoint"
LENGTH = 256
SEEN = ("argparse.py", "typing.py", "pathlib.py", "ast.py")
HELD_OUT = ("http/client.py", "urllib/parse.py")  # as in the split of examples/tiny_moe/train.py

tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)


def windows(files: Sequence[str], count: int) -> dict[str, torch.Tensor]:
    """i64[count, LENGTH] token ids, evenly spaced over the text of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((root / name).read_text(encoding="utf-8") for name in files)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - LENGTH, count).long()
    return {"input_ids": torch.stack([ids[start : start + LENGTH] for start in starts])}


# This is the whole interface. Kernels decode the compressed weights while they multiply.
compiled = moec.compile(CHECKPOINT, passes="+compress-experts", calib=windows(SEEN, 4))
(damage,) = compiled.report().damage
for line in damage.layers:
    print(f"{line.layer}: {line.says}")
(text,) = compiled.generate([tokenizer("def read_lines(path):")["input_ids"]], max_new_tokens=16)
print(f"it writes: {tokenizer.decode(text)!r}\n")

# The same pass alone, with each of its options, without generating code.
original = next(step for step in compiled.pass_results if step.name == "split-packed").program
evaluator = Evaluator(original, load_calibration(windows(HELD_OUT, 4), original, {}))
dense = stored_bytes(original)
stacks = [v for op in original.graph.ops if op.name == "moe.experts" for v in op.inputs[2:]]
weights = sum(math.prod(int(d) for d in stack.shape) for stack in stacks)


def held_out(program: Program) -> float:
    """Perplexity on text that the model was not trained on."""
    perplexity = evaluator.measure(program)[0].perplexity
    assert perplexity is not None
    return perplexity


before = held_out(original)
print(f"perplexity on {', '.join(HELD_OUT)}: {before:.2f} with 16 bits a weight")
print(f"{'':18}{'bits a weight':>14}{'perplexity':>12}{'nats lost':>11}")
points: dict[str, tuple[float, float]] = {"bf16": (16.0, before)}
for by in ("nearest", "gptq"):
    pass_ = MeasuredPass(CompressExperts(by=by), CalibrationSession(windows(SEEN, 4), {}))
    program = run(original, [pass_], stage=Stage.MOE)[-1].program
    bits = 16 - 8 * (dense - stored_bytes(program)) / weights
    after = held_out(program)
    points[f"ternary, {by}"] = (bits, after)
    print(f"{'ternary, ' + by:18}{bits:14.2f}{after:12.2f}{math.log(after / before):11.3f}")

if len(sys.argv) > 1:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for name, (bits, perplexity) in points.items():
        axes.scatter(bits, perplexity)
        axes.annotate(name, (bits, perplexity), textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="bits a weight of the experts", ylabel="perplexity", xscale="log", yscale="log")
    figure.savefig(sys.argv[1])
