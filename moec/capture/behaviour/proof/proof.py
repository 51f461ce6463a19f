"""Proves a description by comparing the outputs of a module and its replacement."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moec.capture.behaviour.layer.description import Description
from moec.capture.behaviour.layer.parts import in_float32
from moec.capture.behaviour.proof.cases import SCALES, BehaviourCase, cases, far_cases
from moec.capture.behaviour.proof.precision import with_precision
from moec.capture.behaviour.proof.probe import (
    LONGEST,
    Probe,
    Run,
    result_leaves,
)
from moec.capture.behaviour.proof.side_outputs import cast_outputs, find_outputs
from moec.capture.behaviour.replacement import Replacement, outputs
from moec.errors import NoMatch
from moec.oracle.rounding import FLOAT32_UNIT
from moec.oracle.tolerance import are_close


@dataclass(frozen=True)
class Proof:
    """A description that held in all of `runs`, with their greatest length and tolerance. In
    `overflows` further runs eager's own results were not finite. It holds up to `farthest` tokens,
    the length of one further run."""

    description: Description | None
    runs: int
    overflows: int = 0
    longest: int = LONGEST
    farthest: int = LONGEST
    tolerance: float = FLOAT32_UNIT

    def __str__(self) -> str:
        text = (
            f"{self.runs} runs next to eager, tokens scaled by {min(SCALES):g} to {max(SCALES):g}, "
            f"up to {self.longest} tokens and once {self.farthest}, agree to {self.tolerance:g} of "
            "the greatest value; more tokens are refused; smaller differences were not seen"
        )
        if self.overflows:
            text += f", nor {self.overflows} runs in which eager overflows"
        return text


def prove(module: nn.Module, probe: Probe, description: Description) -> Proof:
    """Compare the replacement with the probe's shaken copy and with the module itself.

    Raises NoMatch, with the first input on which they differ.
    """
    probe.description = description
    replacement = Replacement(probe.module, description, probe.width)
    items = cast_outputs(module, probe, find_outputs(probe, replacement))
    description = replace(description, outputs=items)
    runs, overflows = 0, 0
    for subject in (probe.module, in_float32(module)):
        here = replace(probe, module=subject, description=description)
        block = Replacement(subject, description, probe.width, replacement.body)
        far = far_cases(here) if subject is probe.module else ()
        for case in itertools.chain(cases(here), far):
            compared = _compare(here, block, case)
            runs, overflows = runs + compared, overflows + (not compared)
    description = with_precision(module, probe, description)
    return Proof(description, runs, overflows, probe.longest, probe.farthest)


def prove_forward(probe: Probe, forward: Callable[..., Any]) -> Proof:
    """As `prove`, for a user's forward. The router is not known, so it is not steered; inputs of
    equal tokens send all of them to one expert instead.

    Raises NoMatch, with the first input on which they differ.
    """
    runs, overflows = 0, 0
    for case in itertools.chain(cases(probe), far_cases(probe)):
        run = probe.run(case.tokens)
        if _overflows(run, case):
            overflows += 1
            continue
        with torch.no_grad():
            leaves = result_leaves(forward(case.tokens))
        names, results = ([name for name, _ in each] for each in (run.leaves, leaves))
        if names != results:
            raise NoMatch(f"it returns {', '.join(names)}, and the forward {', '.join(results)}")
        _compare_leaves(run, [value for _, value in leaves], case)
        runs += 1
    return Proof(None, runs, overflows, probe.longest, probe.farthest)


def _overflows(run: Run, case: BehaviourCase) -> bool:
    """Whether the tokens are so large that eager's own result is not finite."""
    return case.scale > 1 and not bool(run.hidden.isfinite().all())


def _compare(probe: Probe, block: Replacement, case: BehaviourCase) -> bool:
    """Compare one case; False where eager overflows and there is nothing to compare."""
    run = probe.run(case.tokens, case.logits)
    if _overflows(run, case):
        return False
    steered = nullcontext() if case.logits is None else probe.steered(case.logits)
    with torch.no_grad(), steered:
        results = outputs(block, case.tokens)
    _compare_leaves(run, results, case)
    return True


def _compare_leaves(run: Run, results: Sequence[object], case: BehaviourCase) -> None:
    for (name, value), ours in zip(run.leaves, results, strict=True):
        if isinstance(value, torch.Tensor) and isinstance(ours, torch.Tensor):
            if not are_close(ours, value):
                raise NoMatch(_difference(name, value, ours, case))
        elif ours is not value and ours != value:
            raise NoMatch(f"{name} is {value!r}, described {ours!r} ({case})")


def _difference(name: str, value: torch.Tensor, results: torch.Tensor, case: BehaviourCase) -> str:
    if results.shape != value.shape:
        return f"{name} is {tuple(value.shape)}, described {tuple(results.shape)} ({case})"
    last = value.shape[-1] if value.dim() else 1
    value, results = (t.reshape(-1, last).double() for t in (value, results))
    row = int((results - value).nan_to_num(1e30, 1e30, 1e30).abs().amax(1).argmax())
    eager, described = ([float(f"{float(v):.5g}") for v in t[row][:3]] for t in (value, results))
    text = f"{name} differs on {case}: row {row} begins {eager}, described {described}"
    if case.logits is not None and len(case.logits) == len(value):
        text += f"; its logits are {[float(f'{float(v):.5g}') for v in case.logits[row]]}"
    return text
