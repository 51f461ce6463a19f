"""Compiles single operators of PyTorch on torch's own samples of them, and counts the outcomes.

    python -m tests.fuzz.operators --record FILE             the graph after all passes, interpreted
    python -m tests.fuzz.operators --record FILE --build     machine code of the first sample
    python -m tests.fuzz.operators --only einsum             one operator, with all words

An operator has the worst outcome of its samples (float32, small, of different kinds). Those that
FILE has are not tried again. Each runs in a process of its own with a limit of time.

Exit status: 1 if an operator was wrong, crashed, or exceeded its time.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import signal
import sys
import traceback
import types
import unittest
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import moec
from moec.errors import MoecError, VerificationError
from tests.fuzz.judge import Answer, Outcome, Verdict, compare, interpreted

RANDOM = "random"
"""The outcome of operators that draw numbers, which nothing can be compared with."""
WORST = (RANDOM, Outcome.EAGER, Outcome.DENSE, Outcome.REFUSED, Outcome.WRONG, Outcome.CRASH)


class Single(nn.Module):
    """One operator: its tensors are the inputs, all other arguments are constants."""

    def __init__(self, operator: Any, arguments: Any) -> None:
        super().__init__()
        self.operator = operator
        leaves, self.structure = pytree.tree_flatten(arguments)
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.positions = [n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> Any:
        leaves = list(self.constants)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.operator(*args, **kwargs)


def operators() -> dict[str, Any]:
    """torch's descriptions of operators with float32, by name and variant."""
    # torch.testing imports expecttest for test cases of its own, which are not used here.
    module = types.ModuleType("expecttest")
    module.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", module)
    from torch.testing._internal.common_methods_invocations import op_db

    return {
        " ".join(filter(None, (op.name, op.variant_test_name))): op
        for op in op_db
        if torch.float32 in op.dtypes
    }


def samples(operator: Any, most: int) -> Iterator[tuple[Single, tuple[torch.Tensor, ...]]]:
    """Some samples of different kinds: other shapes, or other arguments by name."""
    kinds = set()
    for sample in itertools.islice(operator.sample_inputs("cpu", torch.float32), 40):
        arguments = ((sample.input, *sample.args), sample.kwargs)
        tensors = tuple(leaf for leaf in pytree.tree_leaves(arguments) if torch.is_tensor(leaf))
        kind = (*(t.ndim for t in tensors), *sample.kwargs)
        if kind in kinds or not tensors or any(not 0 < t.numel() <= 4096 for t in tensors):
            continue
        kinds.add(kind)
        yield Single(operator.op, arguments).eval(), tensors
        if len(kinds) == most:
            return


def judge_sample(module: Single, tensors: tuple[torch.Tensor, ...], built: bool) -> Verdict:
    def eager(widened: bool = False, noise: float = 0.0, seed: int = 0) -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return module(*(t.clone() for t in tensors))

    try:
        answer = Answer("", tensors, eager(), eager)
    except Exception:
        return Verdict(Outcome.EAGER, traceback.format_exc(limit=-2))
    try:
        target = "cpu" if built else "null"
        compiled = moec.compile(module, tensors, target=target, allow_fixed=True, verify=built)
        run = compiled if built else interpreted(compiled)
        wrong, refused = compare(run, [answer], "float32")
    except VerificationError as error:
        return Verdict(Outcome.WRONG, str(error))
    except MoecError as error:
        if "a defect of moec" in str(error):
            return Verdict(Outcome.CRASH, str(error))
        return Verdict(Outcome.REFUSED, f"{type(error).__name__}: {error}")
    except Exception:
        return Verdict(Outcome.CRASH, traceback.format_exc())
    words = [*wrong, *refused, ""][0]
    outcome = Outcome.WRONG if wrong else Outcome.REFUSED if refused else Outcome.DENSE
    return Verdict(outcome, words)


def judge_operator(operator: Any, built: bool) -> dict[str, Any]:
    """The worst outcome of an operator's samples, its words, and the sample's shapes."""
    torch.manual_seed(0)
    verdicts = []
    for module, tensors in samples(operator, 1 if built else 2):
        shapes = [list(t.shape) for t in tensors]
        with torch.no_grad():
            first, second = (
                pytree.tree_leaves(module(*(t.clone() for t in tensors))) for _ in range(2)
            )
        pairs = zip(first, second, strict=True)
        if any(torch.is_tensor(a) and not a.equal(b) and not a.isnan().any() for a, b in pairs):
            return {"outcome": RANDOM, "words": "", "shapes": shapes}
        verdicts.append((judge_sample(module, tensors, built), shapes))
    if not verdicts:
        return {"outcome": Outcome.EAGER, "words": "no small sample", "shapes": []}
    verdict, shapes = max(verdicts, key=lambda pair: WORST.index(pair[0].outcome))
    return {"outcome": verdict.outcome, "words": verdict.words, "shapes": shapes}


def in_process(name: str, operator: Any, built: bool, seconds: int, record: Path) -> None:
    """Writes a line of JSON of an operator, from a fork of this process; its end is one too."""
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        warnings.simplefilter("ignore")
        try:
            line = judge_operator(operator, built)
        except Exception:
            line = {"outcome": Outcome.EAGER, "words": traceback.format_exc(), "shapes": []}
        write(record, {"name": name, **line})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        words = f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        write(record, {"name": name, "outcome": Outcome.CRASH, "words": words, "shapes": []})


def write(record: Path, line: dict[str, Any]) -> None:
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(record: Path) -> dict[str, dict[str, Any]]:
    lines = record.read_text().splitlines() if record.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.operators", allow_abbrev=False)
    parser.add_argument("--record", type=Path, default=Path(os.devnull), help="a line an operator")
    parser.add_argument("--build", action="store_true", help="machine code for CPUs")
    parser.add_argument("--only", action="append", help="an operator; may be repeated")
    parser.add_argument("--seconds", type=int, default=120, help="for each; default: 120")
    options = parser.parse_args(arguments)
    os.nice(10)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = operators()
    if options.only:
        for name in options.only:
            line = judge_operator(table[name], options.build)
            print(f"{name}: {line['outcome']} {line['shapes']}\n{line['words']}")
        return 0
    done = read(options.record)
    for name, operator in table.items():
        if name not in done:
            in_process(name, operator, options.build, options.seconds, options.record)
    counts = collections.Counter(line["outcome"] for line in read(options.record).values())
    for outcome in WORST:
        print(f"{counts[outcome]:6} {outcome}")
    return int(bool(counts[Outcome.WRONG] or counts[Outcome.CRASH]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
