"""Exports a module with torch.export, and converts the export to a program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as symbolic_config
from torch.export import ExportedProgram

from moec.capture.calls.call import PREFIX, ModuleCall, casts_done
from moec.capture.calls.states import States
from moec.capture.calls.trials import quiet
from moec.capture.conversion.exported import to_program
from moec.capture.decomposition import decompose
from moec.capture.export.huggingface import experts_as_ops
from moec.capture.linear_attention.lightning import lightning_as_ops
from moec.capture.linear_attention.scans import scans_as_ops
from moec.capture.size_functions.float_ranges import float_ranges_known
from moec.capture.size_functions.literals import floats_symbolic
from moec.capture.size_functions.numbers import export_keeping_sizes
from moec.capture.size_functions.size_math import math_of_sizes
from moec.capture.size_functions.size_text import texts_guarded
from moec.capture.size_functions.sizes_as_keys import SizeAsKey, sizes_as_keys
from moec.capture.size_functions.sizes_as_numbers import sizes_as_numbers
from moec.capture.size_functions.sym_bools import sym_bools_answered
from moec.capture.sizes.axis_groups import AxisGroup
from moec.capture.sizes.guards import located
from moec.capture.sizes.widen import Widened
from moec.capture.sizes.wishes import Axes, name_symbols
from moec.capture.speculate import explained, scripts_as_python
from moec.capture.state.reach import values_kept
from moec.capture.state.size_tables import tables_by_size
from moec.capture.user_code.stacks import short_stacks
from moec.interpret.outputs import Structure, flatten
from moec.ir.graph import Program
from moec.ir.sizes.dims import Bounds
from moec.oracle.cases import Eager


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


def export_module(general: Widened, module: torch.nn.Module) -> ExportedProgram:
    """Export `module` with the tensors of `general`. Raises what torch.export raises."""
    try:
        return _export(general, module)
    except SizeAsKey:
        with tables_by_size(module):
            return _export(general, module)


def _export(general: Widened, module: torch.nn.Module) -> ExportedProgram:
    with (
        torch.no_grad(),
        values_kept(module),
        experts_as_ops(module),
        scans_as_ops(module),
        lightning_as_ops(module),
        casts_done(),
        scripts_as_python(),
        sym_bools_answered(module),
        sizes_as_numbers(module),
        sizes_as_keys(module),
        math_of_sizes(module),
        texts_guarded(),
        floats_symbolic(),
        float_ranges_known(),
        located(),
        short_stacks(),
        symbolic_config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=True, use_duck_shape=False
        ),
        # Hashing symbolic operands takes longer than inferring an operator's result again.
        dynamo_config.patch(fake_tensor_cache_enabled=False),
        warnings.catch_warnings(),
        quiet(),
    ):
        warnings.simplefilter("ignore", FutureWarning)
        # No call reads what an earlier one left (`moec.capture.earlier_calls`).
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        return torch.export.export(
            module, general.tensors, dynamic_shapes=(general.wishes,), strict=False
        )


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
