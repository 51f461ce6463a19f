"""Families x standard deviations of weights x 16-bit dtypes: verified, and a planted error found.

    python -m tests.verify.matrix [--families mixtral,…] [--layers 3]

The planted error: the first expert's weights of one stack of one layer are 2 % too large in the
last graph. A line per model says "verified" or the refusal, and "found" or "MISSED".
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

import moec
from moec.errors import MoecError, VerificationError
from moec.model.compiled import CompiledModel
from moec.verify.check import check
from tests.models.families import FAMILIES, Family

NAMES = "mixtral,qwen2_moe,qwen3_moe,olmoe,deepseek_v3,granitemoe,gpt_oss"
DEVIATIONS = (0.02, 0.08, 0.2)
DTYPES = (torch.bfloat16, torch.float16)


def deviating(family: Family, std: float, layers: int) -> Family:
    fields = {"initializer_range": std, "num_hidden_layers": layers}
    return replace(family, fields={**family.fields, **fields})


def planted(compiled: CompiledModel) -> str:
    """Whether the comparison finds 2 % in one expert of one layer."""
    last = compiled.pass_results[-1]
    _, executor = compiled.ready()
    stacks = [name for name, weight in last.program.weights.items() if weight.ndim == 3]
    name = stacks[len(stacks) // 2]
    stack = last.program.weights[name].clone()
    stack[0] *= 1.02
    program = replace(last.program, weights={**last.program.weights, name: stack})

    def run(inputs):  # type: ignore[no-untyped-def]
        executor.reset()
        return executor(inputs)

    try:
        passes = (*compiled.pass_results[:-1], replace(last, program=program))
        check(compiled.captured, run, passes)
    except VerificationError:
        return f"found in {name}"
    return f"MISSED in {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default=NAMES)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    for name in options.families.split(","):
        for std in DEVIATIONS:
            for dtype in DTYPES:
                family = deviating(FAMILIES[name], std, options.layers)
                start = time.process_time()
                try:
                    compiled = moec.compile(family.build(dtype), kwargs=family.inputs(2, 7))
                    outcome = f"verified; {planted(compiled)}"
                except MoecError as refusal:
                    outcome = f"REFUSED: {' '.join(str(refusal).split())}"
                seconds = time.process_time() - start
                print(f"{name} {std} {dtype} {seconds:.0f} s: {outcome}"[:600], flush=True)


if __name__ == "__main__":
    main()
