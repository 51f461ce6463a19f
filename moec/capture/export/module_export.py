"""Exports a module with torch.export, and converts the export to a program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.calls.call import PREFIX, ModuleCall
from moec.capture.calls.states import States
from moec.capture.calls.trials import quiet
from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose
from moec.capture.export.huggingface import experts_as_ops
from moec.capture.export.keeping_sizes import Files, export_keeping_sizes
from moec.capture.intercept.interceptor import Handler, intercepted
from moec.capture.intercept.table import traced_handlers
from moec.capture.linear_attention.lightning import lightning_handlers
from moec.capture.linear_attention.scans import scan_handlers
from moec.capture.sizes.axis_groups import AxisGroup
from moec.capture.sizes.widen import Widened
from moec.capture.sizes.wishes import Axes, name_symbols
from moec.capture.speculate import explained
from moec.capture.state.reach import values_kept
from moec.interpret.outputs import Structure, flatten
from moec.ir.graph import Program
from moec.ir.sizes.dims import Bounds
from moec.oracle.cases import Eager
from moec.torch_private import dynamo_config, lazy_graph_modules, symbolic_config


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
        return torch.export.export(
            module, general.tensors, dynamic_shapes=(general.wishes,), strict=False
        )


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
            return tuple(t.clone() for t in results) if states.live else results

    return eager
