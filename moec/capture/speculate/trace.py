"""Exports a module under hooks, and records the assumptions of the capture."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.calls.call import FlatCall, ModuleCall
from moec.capture.speculate.branches import Branches, Question
from moec.capture.speculate.facts.symbols import expression, is_symbolic
from moec.capture.speculate.operators.held_numbers import hold
from moec.capture.speculate.operators.hooks import Trace
from moec.capture.speculate.patches import speculating
from moec.capture.speculate.randomness import refuse_random
from moec.capture.user_code.sites import Site, foreign
from moec.errors import CaptureError
from moec.interpret.outputs import Structure

Export = Callable[[torch.nn.Module], ExportedProgram]
_ASSERTIONS = ("_assert", "sym_constrain")


@dataclass(frozen=True)
class Assumed:
    """The assumptions of a capture: the answer to each branch on data, the conditions evaluated
    there, the lines where random numbers were left out, and those where data were read into Python.

    After the module's outputs, the export returns the values on which the conditions depend:
    `readouts` has for each the symbol, or the number of the question for a tensor. `sizes` has for
    each symbol of a size its (input, axis).
    """

    branches: Mapping[Site, bool] = field(default_factory=dict)
    questions: Sequence[Question] = ()
    readouts: Sequence[Any] = ()
    sizes: Mapping[Any, tuple[int, int]] = field(default_factory=dict)
    noise: Sequence[str] = ()
    reads: Sequence[str] = ()


@dataclass(frozen=True)
class Traced:
    """`lists_classes`: pieces of sorted rows are the rows of a class in it."""

    exported: ExportedProgram
    structure: Structure
    assumed: Assumed
    lists_classes: bool = False


@dataclass
class _Record:
    """What a forward under hooks records. It is a separate object, because torch.export resets
    attributes of the module."""

    trace: Trace
    readouts: tuple[Any, ...] = ()
    sizes: dict[Any, tuple[int, int]] = field(default_factory=dict)


_UNEQUAL = re.compile(r"\(s\d+\) must match .*\(s\d+\)")
"""Two sizes of inputs, which the example shows to be one where it goes the same way."""


class _Hooked(FlatCall):
    """A call whose module runs under hooks."""

    def __init__(self, call: ModuleCall, record: _Record) -> None:
        super().__init__(call)
        self.record = record

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trace = self.record.trace
        trace.sizes.update(_sizes(tensors))
        self.record.sizes.update(_axes(tensors))
        with speculating(self.module, trace) as mode:
            outputs = tuple(mode.latest(list(super().forward(*tensors))))
        readouts = _readouts(trace)
        self.record.readouts = tuple(readouts)
        return (*outputs, *(tensor.detach().clone() for tensor in readouts.values()))

    def hold(self, value: Any) -> torch.Tensor | None:
        return hold(self.record.trace, value)


def trace(
    call: ModuleCall,
    export: Export,
    answers: Mapping[Site, bool],
    open_lengths: frozenset[int] = frozenset(),
    by_class: bool = True,
) -> Traced:
    """Export `call` with the given answers to branches on data. Raises what `export` raises.

    A mask may have one index more than there are experts, for tokens without an expert. If the loop
    body raises IndexError there, the module cannot hold such tokens, and the index is left out.
    """
    branches = Branches(foreign(("torch", "numpy", "sympy")), answers)
    record = _Record(Trace(branches, open=open_lengths, by_class=by_class))
    try:
        hooked = _Hooked(call, record)
        exported = _without_assertions(export(hooked))
    except IndexError:
        last = record.trace.lengths[-1:]
        if not last or last[0] in open_lengths:
            raise
        return trace(call, export, answers, open_lengths | {last[0]}, by_class)
    except RuntimeError as error:
        if not branches.met or not _UNEQUAL.search(str(error)):
            raise
        *_, (site, answer) = branches.met.items()
        raise CaptureError(
            f"where `{site.text}` is {answer}, sizes must be equal that differ in general, and the "
            "example does not go that way: give one that does"
        ) from error
    refuse_random(type(call.module).__name__, exported, tuple(record.trace.noise))
    noise, reads = tuple(record.trace.noise), tuple(record.trace.reads)
    assumed = Assumed(branches.met, branches.questions, record.readouts, record.sizes, noise, reads)
    return Traced(exported, hooked.structure, assumed, record.trace.lists_classes)


def _readouts(trace: Trace) -> dict[Any, torch.Tensor]:
    """The tensors on which conditions depend, by symbol or by number of the question."""
    readouts: dict[Any, torch.Tensor] = {}
    for number, question in enumerate(trace.branches.questions):
        if question.tensor is not None:
            readouts[number] = (question.tensor != 0).reshape(())
        else:
            symbols = sorted(question.condition.free_symbols, key=str)
            readouts |= {s: trace.readouts[s] for s in symbols if s in trace.readouts}
    return readouts


def _axes(tensors: Sequence[torch.Tensor]) -> dict[Any, tuple[int, int]]:
    return {
        expression(size): (number, axis)
        for number, tensor in enumerate(tensors)
        for axis, size in enumerate(tensor.shape)
        if is_symbolic(size) and expression(size).is_Symbol
    }


def _sizes(tensors: Sequence[torch.Tensor]) -> dict[Any, Any]:
    """Each symbolic size of the inputs, and the products of sizes of one input, largest first."""
    sizes: dict[Any, Any] = {}
    for tensor in tensors:
        symbolic = [size for size in tensor.shape if is_symbolic(size)]
        for count in range(len(symbolic), 0, -1):
            for group in itertools.combinations(symbolic, count):
                number = reduce(operator.mul, group)
                sizes.setdefault(expression(number), number)
    return sizes


def _without_assertions(exported: ExportedProgram) -> ExportedProgram:
    """Removes assertions of the graph: what was assumed is proved instead."""
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        if any(part in str(node.target) for part in _ASSERTIONS) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported
