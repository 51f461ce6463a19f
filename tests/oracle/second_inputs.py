"""Sixty layers whose second input matters at some sizes only, or not in the example, and a judge
that calls them at other sizes with other values. The judge is eager.

`python -m tests.oracle.second_inputs --door onnx` says of each layer whether it is equal, wrong or
refused behind this door.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from moec.errors import InputError, MoecError
from tests.oracle.conditions import CONDITIONS
from tests.oracle.doors import DOORS, Run
from tests.oracle.experts import Routed
from tests.oracle.masks import MASKS
from tests.oracle.values import inputs, parameters

LAYERS: dict[str, type[Routed]] = MASKS | CONDITIONS
SIZES = ((1, 1), (1, 2), (2, 1), (1, 5), (2, 3), (3, 4), (4, 1), (5, 8))
DRAWS = 6
TOLERANCE = 1e-4
"""Relative to the greatest value: float32 sums of a few dozen terms in another order, after a
softmax of logits that a temperature of 0.1 makes ten times as far apart."""


@dataclass(frozen=True)
class Verdict:
    """What is wrong or refused, in words, and the number of calls that eager answers. `reason` is
    why the layer does not compile."""

    calls: int = 0
    wrong: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    reason: str = ""

    @property
    def outcome(self) -> str:
        return "wrong" if self.wrong else "refused" if self.reason else "ok"


def layer(name: str) -> Routed:
    torch.manual_seed(0)
    module: Routed = LAYERS[name]().eval()
    return module


def judge(name: str, compile: Callable[[Routed], Run]) -> Verdict:
    """Compares what `compile` returns with eager in all calls that eager answers."""
    module = layer(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = compile(layer(name))
    except MoecError as error:
        return Verdict(reason=f"{type(error).__name__}: {error}")
    wrong, refused, calls = [], [], 0
    with torch.no_grad():
        for (B, S), number in itertools.product(SIZES, range(DRAWS)):
            values, drawn = inputs(parameters(module), B, S, number)
            try:
                expected = module(*(t.clone() for t in drawn))
            except Exception:
                continue
            calls += 1
            call = f"{name} {B}x{S} {values}"
            try:
                words = difference(run(*(t.clone() for t in drawn)), expected)
            except InputError as error:
                refused.append(f"{call}: {error}")
                continue
            except Exception as error:
                words = f"{type(error).__name__}: {error}"
            if words:
                wrong.append(f"{call}: {words}")
    return Verdict(calls, tuple(wrong), tuple(refused))


def difference(actual: Any, expected: Any) -> str:
    """In words; "" where results are equal."""
    ours, answers = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    if len(ours) != len(answers):
        return f"{len(ours)} outputs, and eager has {len(answers)}"
    for a, b in zip(ours, answers, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{list(a.shape)}, and eager's {b.dtype}{list(b.shape)}"
        finite = b[b.isfinite()].abs()
        limit = TOLERANCE * float(finite.max()) if finite.numel() else 0.0
        if not torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True):
            return f"differs by {float((a - b).abs().max()):.1e}"
    return ""


def report(name: str, door: str) -> Verdict:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        verdict = judge(name, lambda module: DOORS[door](module, Path(folder)))
    words = next(filter(None, (*verdict.wrong, verdict.reason, *verdict.refused)), "")
    seconds = time.process_time() - start
    print(
        f"{verdict.outcome:8}{name:22}{len(verdict.wrong):3} wrong {len(verdict.refused):3} refused"
        f" of {verdict.calls:2} {seconds:4.1f} s  {' '.join(words.split())[:90]}",
        flush=True,
    )
    return verdict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.second_inputs")
    parser.add_argument("parts", nargs="*", help="parts of names of layers; default: all")
    parser.add_argument("--door", choices=DOORS, default="graph")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [n for n in LAYERS if not options.parts or any(part in n for part in options.parts)]
    print(dict(Counter(report(name, options.door).outcome for name in chosen)))
