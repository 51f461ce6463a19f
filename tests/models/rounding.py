"""Verification of random models in 16 bits, with and without an error of 2 % in one expert.

    python -m tests.models.rounding mixtral,olmoe --std 0.02,0.2 --dtype bfloat16

A line each: what verification says, and whether it finds an error that was planted in the weights
of one expert of the middle layer, in the graph after the passes and in the packed code.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

import moec
from moec.errors import VerificationError
from moec.model.compiled import CompiledModel
from moec.passes.core.runner import PassResult
from moec.verify.check import check
from tests.models.families import FAMILIES, Family

SEVEN = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "granitemoe", "gpt_oss")
SIZE = (2, 7)
ERROR = 1.02
LAYER = "layers.1."


def family(name: str, std: float) -> Family:
    """A family with three layers and weights of a standard deviation."""
    fields = {**FAMILIES[name].fields, "num_hidden_layers": 3, "initializer_range": std}
    return replace(FAMILIES[name], fields=fields)


def planted_in_graph(compiled: CompiledModel) -> tuple[PassResult, ...]:
    """The results of the passes, the last with the error in the largest stack of the layer."""
    last = compiled.pass_results[-1]
    stacks = {n: w for n, w in last.program.weights.items() if w.ndim == 3 and LAYER in n}
    name = max(stacks, key=lambda n: stacks[n].numel())
    weights = {**last.program.weights, name: stacks[name].clone()}
    weights[name][0] *= ERROR
    program = replace(last.program, weights=weights)
    return (*compiled.pass_results[:-1], replace(last, program=program))


def planted_in_code(model: torch.nn.Module, inputs: Mapping[str, Any]) -> CompiledModel:
    """The model compiled with the error in the first expert of the layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if LAYER in name and weight.ndim == 3:
                weight[0] *= ERROR
    return moec.compile(other, (), inputs, verify=False)


def runs(compiled: CompiledModel) -> Any:
    _, executor = compiled.ready()

    def run(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        executor.reset()
        return executor(inputs)

    return run


def is_refused(compiled: CompiledModel, code: CompiledModel, passes: Any) -> bool:
    try:
        check(compiled.captured, runs(code), passes)
    except VerificationError:
        return True
    return False


def line(name: str, std: float, dtype: str) -> str:
    chosen = family(name, std)
    model, inputs = chosen.build(getattr(torch, dtype)), chosen.inputs(*SIZE)
    start = time.process_time()
    try:
        compiled = moec.compile(model, (), inputs)
    except VerificationError as error:
        return f"refused: {error}"
    seconds = time.process_time() - start
    checked = compiled.checked
    assert checked is not None
    graph = is_refused(compiled, compiled, planted_in_graph(compiled))
    code = is_refused(compiled, planted_in_code(model, inputs), compiled.pass_results)
    return (
        f"verified in {seconds:.1f} s of CPU, greatest error {max(checked.errors.values()):.1e}, "
        f"{checked.strays} strays and {checked.eager_strays} of eager among {checked.rows} rows; "
        f"2 % in the graph {'found' if graph else 'NOT FOUND'}, "
        f"in the code {'found' if code else 'not found'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.models.rounding")
    parser.add_argument("families", nargs="?", default=",".join(SEVEN))
    parser.add_argument("--std", default="0.02,0.08,0.2")
    parser.add_argument("--dtype", default="bfloat16,float16")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.families.split(","):
        for std in map(float, options.std.split(",")):
            for dtype in options.dtype.split(","):
                print(f"{name:12} {std:4} {dtype:8}  {line(name, std, dtype)}", flush=True)


if __name__ == "__main__":
    main()
