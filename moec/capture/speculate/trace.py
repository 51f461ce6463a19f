"""Exports a module under hooks, and records the assumptions of the capture."""

from __future__ import annotations

import builtins
import itertools
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram

from moec import torch_private
from moec.capture.calls.call import FlatCall, ModuleCall
from moec.capture.intercept.arithmetic import floor_divides
from moec.capture.intercept.interceptor import Handler, intercepted
from moec.capture.intercept.substitutes import SHADOWS
from moec.capture.speculate.branches import Branches, Question, is_condition
from moec.capture.speculate.facts.rounding import Rounding, divided
from moec.capture.speculate.facts.symbols import expression, is_symbolic, reads_data
from moec.capture.speculate.operators.hooks import Trace
from moec.capture.speculate.operators.mode import Speculation
from moec.capture.speculate.randomness import refuse_random
from moec.capture.user_code.sites import Site, foreign
from moec.errors import CaptureError
from moec.ir.interpret.outputs import Structure
from moec.torch_private import (
    FakeTensor,
    GuardOnDataDependentSymNode,
    Max,
    Min,
    ShapeEnv,
    place,
    plain_setup_context,
)

_CONTEXT = (
    "save_for_backward save_for_forward mark_non_differentiable mark_dirty set_materialize_grads"
).split()


@contextmanager
def speculating(module: torch.nn.Module, trace: Trace) -> Iterator[Speculation]:
    """While open, the code of `module` runs under the hooks of `trace`. One thread at a time."""
    mode = Speculation(trace)
    with intercepted(module, _handlers(mode, trace), trace.branches.foreign), mode:
        yield mode


def _handlers(mode: Speculation, trace: Trace) -> Iterator[Handler]:
    yield from (Handler(builtins, name, handler) for name, handler in SHADOWS.items())
    yield Handler(*place("evaluate_expr"), _evaluate(torch_private.evaluate_expr, trace.branches))
    yield Handler(FakeTensor, "tolist", lambda tensor: mode.hooks["tolist"](None, tensor))
    yield Handler(torch.autograd.Function, "apply", classmethod(_forward_alone))
    for how in ("floor", "ceil", "trunc"):
        name = f"__{how}__"
        yield Handler(torch.SymFloat, name, _rounded(how, getattr(torch.SymFloat, name), trace))


def _evaluate(original: Callable[..., Any], branches: Branches) -> Callable[..., Any]:
    """Replaces the function that evaluates every condition on symbolic numbers."""

    def evaluate_expr(env: ShapeEnv, condition: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(env, condition, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if not is_condition(condition):
                raise
            return branches.decide(env, condition)

    return evaluate_expr


def _forward_alone(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the forward of a custom autograd.Function; what it saves for backward is discarded."""
    split = cls.setup_context is not plain_setup_context
    if split:
        return cls.forward(*args, **kwargs)
    nothing = dict.fromkeys(_CONTEXT, lambda *_, **__: None)
    context = types.SimpleNamespace(needs_input_grad=(False,) * len(args), **nothing)
    return cls.forward(context, *args, **kwargs)


def _rounded(how: Any, original: Callable[[Any], Any], trace: Trace) -> Callable[[Any], Any]:
    rounding: Rounding = how

    def rounded(value: torch.SymFloat) -> Any:
        integer = None if floor_divides() else divided(value, rounding, trace.sizes)
        return original(value) if integer is None else integer

    return rounded


# Numbers that a module returns, computed again with tensors.
#
# A count that Python has read is a symbol, such as the length of a list of rows. The graph
# may lose this list: recognised experts have none. So the number is computed from the tensors that
# the symbols were read from.
def hold(trace: Trace, value: Any) -> torch.Tensor | None:
    """A tensor [] of a symbolic number; None where it is computed in a way that is not repeated.

    Integers are i64, floats that were read from a tensor have its dtype.
    """
    if isinstance(value, torch.SymFloat):
        return _read(trace, expression(value))
    if not isinstance(value, torch.SymInt):
        return None
    if not reads_data(value):
        return _of_size(value)

    def computed(expr: sympy.Expr) -> torch.Tensor | None:
        tensor = _read(trace, expr)
        if tensor is not None:
            return tensor.to(torch.int64)
        if expr.is_Integer:
            return torch.full((), int(expr), dtype=torch.int64)
        size = trace.sizes.get(expr, trace.cuts.get(expr))
        if size is not None and not reads_data(size):
            return _of_size(size)
        for kind, combine in _COMBINE.items():
            if isinstance(expr, kind):
                parts = [computed(part) for part in expr.args]
                tensors = [part for part in parts if part is not None]
                return reduce(combine, tensors) if len(tensors) == len(parts) else None
        return None

    return computed(expression(value))


_COMBINE: dict[Any, Any] = {
    sympy.Add: torch.add,
    sympy.Mul: torch.mul,
    (Max, sympy.Max): torch.maximum,
    (Min, sympy.Min): torch.minimum,
}


def _of_size(size: Any) -> torch.Tensor:
    return torch.full((), size, dtype=torch.int64)


def _read(trace: Trace, expr: sympy.Expr) -> torch.Tensor | None:
    tensor = trace.readouts.get(expr)
    return None if tensor is None else tensor.reshape(())


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
    for node in graph.nodes:  # torch forgets users as it inlines a region of no_grad
        for operand in node.all_input_nodes:
            operand.users.setdefault(node)
    for node in reversed(list(graph.nodes)):
        if any(part in str(node.target) for part in _ASSERTIONS) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported
