"""Exports a module with torch.export, and converts the export to a program."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from moec.capture.calls.call import PREFIX, ModuleCall
from moec.capture.calls.states import States
from moec.capture.calls.trials import quiet
from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose
from moec.capture.export.huggingface import experts_as_ops
from moec.capture.intercept.interceptor import Handler, intercepted
from moec.capture.intercept.substitutes import CONVERSIONS, SHADOWS, python_type
from moec.capture.intercept.table import traced_handlers
from moec.capture.linear_attention.lightning import lightning_handlers
from moec.capture.linear_attention.scans import scan_handlers
from moec.capture.sizes.axis_groups import AxisGroup
from moec.capture.sizes.guards import Guard, raw_guards
from moec.capture.sizes.widen import Widened
from moec.capture.sizes.wishes import Axes, name_symbols
from moec.capture.speculate import explained
from moec.capture.state.reach import values_kept
from moec.ir.graph import Program
from moec.ir.interpret.outputs import Structure, flatten
from moec.ir.sizes.dims import Bounds
from moec.oracle.cases import Eager
from moec.torch_private import dynamo_config, lazy_graph_modules, symbolic_config

# Keeps sizes symbolic where user code calls int(), float() or len() on them.
#
# Python requires int() to return an int, so int(n * 2.0 / 8) makes torch evaluate the size in the
# example, record a guard (floor(n/4) == 6), and put the constant into the graph. Where a guard
# comes from such a line, the module is exported again with substitutes of these functions in that
# file, and with a one_hot that accepts a symbolic number of classes (a capacity). The same is done
# for min() and max() of floats. Those of integers, round(), math.floor and ceil need no help.

Files = Mapping[str, Mapping[str, Any]]
"""By file, the substitutes of builtins there."""

_ASKS = re.compile(r"\b(int|float|len|one_hot)\b")
_CHOOSES = re.compile(r"\b(min|max)\s*\(")
_FLOATS = frozenset({"IntTrueDiv", "FloatTrueDiv", "ToFloat", "FloatPow"})


def export_keeping_sizes(export: Callable[[Files], ExportedProgram]) -> ExportedProgram:
    """The result of `export`, repeated while lines that convert a size to a number, or choose among
    floats of sizes, cause guards.

    A module may fail with the substitutes. In that case the previous export is returned, and its
    guards are refused later, when they are settled.
    """
    files: Files = {}
    exported = export(files)
    while True:
        more = _substitutes(raw_guards(exported), files)
        if more == files:
            return exported
        files = more
        try:
            with _Sized():
                exported = export(files)
        except Exception:  # whatever the module raises
            return exported


def _substitutes(guards: Iterable[Guard], files: Files) -> Files:
    """Those of `files`, and those of the lines that `guards` come from."""
    functions = dict(files)
    for guard in guards:
        if guard.file and _chooses_float(guard):
            functions[guard.file] = SHADOWS
        elif guard.file and isinstance(guard.condition, sympy.Eq) and _converts(guard.text):
            functions.setdefault(guard.file, CONVERSIONS)
    return functions


def _converts(line: str) -> bool:
    """Whether a line of code may convert a size to a number; True if its text is missing."""
    return not line or _ASKS.search(line) is not None


def _chooses_float(guard: Guard) -> bool:
    """Whether a guard comes from min() or max() of a float. That of integers is a branch that
    chooses a size, which is exported on both sides."""
    kinds = {type(part).__name__ for part in guard.condition.atoms(sympy.Function)}
    return bool(kinds & _FLOATS) and _CHOOSES.search(guard.text) is not None


class _Sized(TorchFunctionMode):
    """Lets one_hot take a symbolic number of classes, and torch's functions the substitutes of int
    and float as dtypes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(map(python_type, args))
        named = {name: python_type(value) for name, value in (kwargs or {}).items()}
        if func is torch.nn.functional.one_hot:
            ids, count = _one_hot(*args, **named)
            if not isinstance(count, int):
                classes = torch.arange(count, dtype=torch.int64)  # as torch decomposes one_hot
                return (ids.unsqueeze(-1) == classes).to(torch.int64)
        return func(*args, **named)


def _one_hot(tensor: torch.Tensor, num_classes: Any = -1) -> tuple[torch.Tensor, Any]:
    return tensor, num_classes


def export_call(call: ModuleCall, general: Widened) -> ExportedProgram:
    """Export the call. Raises CaptureError with torch's reason."""
    attempt = partial(export_keeping_sizes, partial(export_module, general, call))
    with explained(type(call.module).__name__):
        try:
            return attempt()
        except RuntimeError as error:
            if "Couldn't swap" not in str(error):
                raise
            call(*general.tensors)  # a module casts a submodule: run it once, then export
            return attempt()


def export_module(
    general: Widened, module: torch.nn.Module, files: Files | None = None
) -> ExportedProgram:
    """Export `module` with the tensors of `general`, and the substitutes of builtins in `files`.
    Raises what torch.export raises."""
    with (
        torch.no_grad(),
        values_kept(module),
        experts_as_ops(module),
        intercepted(module, handlers_of(module), files=files),
        symbolic_config.patch(backed_size_oblivious=True, use_duck_shape=False),
        # Hashing symbolic operands takes longer than inferring an operator's result again.
        dynamo_config.patch(fake_tensor_cache_enabled=False),
        lazy_graph_modules(True),
        warnings.catch_warnings(),
        quiet(),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        # No call reads what an earlier one left (`moec.capture.earlier_calls`).
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        shapes = (general.wishes,) if general.tensors else None  # torch: none for no inputs
        return torch.export.export(module, general.tensors, dynamic_shapes=shapes, strict=False)


def handlers_of(module: torch.nn.Module) -> Iterator[Handler]:
    """What is replaced while a module is exported."""
    yield from traced_handlers()
    yield from scan_handlers(module)
    yield from lightning_handlers(module)


def convert(
    exported: ExportedProgram,
    names: Sequence[str],
    wishes: Sequence[Axes],
    bounds: Mapping[str, Bounds],
    outputs: Sequence[str],
    groups: Iterable[AxisGroup] = (),
) -> Program:
    exported = decompose(exported)
    return to_program(
        exported,
        rename=symbol_names(exported, wishes, groups),
        bounds=bounds,
        input_names=names,
        output_names=outputs,
        prefix=PREFIX,
    )


def symbol_names(
    exported: ExportedProgram, wishes: Sequence[Axes], groups: Iterable[AxisGroup] = ()
) -> dict[str, str]:
    """torch's symbols in the inputs' shapes, each with its name in the IR."""
    input_names = exported.graph_signature.user_inputs
    held = [
        n.meta["val"]
        for n in exported.graph.nodes
        if n.op == "placeholder" and n.name in input_names
    ]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    return name_symbols(tensors, wishes, [group.axes for group in groups])


def from_start(states: States, run: Callable[..., Any], structure: Structure) -> Eager:
    """`run` without gradients, starting from the first states in each call. Its results share no
    memory with the states. Raises VaryingOutput where the constants in its result differ from those
    in `structure`."""

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), states.from_start():
            results, returned = flatten(run(*tensors), structure.numbers)
            structure.check(returned, ", ".join(str(tuple(tensor.shape)) for tensor in tensors))
            return tuple(t.clone() if states.live else t.detach() for t in results)

    return eager
