"""Captures what is a graph already: exported programs, and modules that run a graph of moec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from moec.capture.calls.states import detached
from moec.capture.captured import Captured
from moec.capture.conversion.exported import structure_of
from moec.capture.conversion.index_requirements import with_asserted
from moec.capture.export.module_export import convert, from_start, symbol_names
from moec.capture.sizes.constant_sizes import fold_constant_sizes
from moec.capture.sizes.fixed_axes import notes as fixed_notes
from moec.capture.sizes.guard_text import guards_in_text
from moec.capture.sizes.settle import settled
from moec.errors import CaptureError
from moec.interpret.graph_module import GraphModule
from moec.ir.sizes.dims import Bounds
from moec.torch_private import pytree


def capture_export(
    exported: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    bounds: Mapping[str, Bounds] | None,
) -> Captured:
    """Capture an ExportedProgram of the user's, with the sizes that it declares.

    Without arguments, the example inputs stored in it are used; without those, the example is
    empty. Raises CaptureError where the arguments have another structure.
    """
    spec = exported.call_spec.in_spec
    if args or kwargs:
        arguments = (tuple(args), dict(kwargs))
        if pytree.tree_structure(arguments) != spec:
            raise CaptureError(
                "the exported program was not exported with arguments such as these: it takes "
                f"{', '.join(map(str, exported.graph_signature.user_inputs))}"
            )
    else:
        arguments = exported.example_inputs or ((), {})
    example = _tensors(arguments)
    names = [str(name) for name in exported.graph_signature.user_inputs]
    guards = guards_in_text(exported, symbol_names(exported, [{} for _ in names]))
    module = exported.module(check_guards=False)

    def run(*tensors: torch.Tensor) -> Any:
        positional, named = pytree.tree_unflatten(list(tensors), spec)
        return module(*positional, **named)

    structure = structure_of(exported)
    program = convert(exported, names, [{} for _ in names], bounds or {}, structure.names)
    program, states = detached(program)
    eager = from_start(states, run, structure)
    settlement = settled("the exported program", program, guards, None, example)
    program = fold_constant_sizes(settlement.bounded(program))
    program = replace(program, graph=with_asserted(program.graph, program.weights))
    always = fixed_notes(program, len(names))
    return Captured(program, eager, example, structure, (*always, *settlement.notes))


def capture_graph(
    model: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> Captured:
    """Capture a module that is a graph already: nothing is traced; its current weights are used."""
    if dynamic_shapes is not None:
        raise CaptureError(
            "the sizes of a transformed module are fixed: transform it again with shapes"
        )
    example = model.inputs(args, kwargs)

    def eager(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return model.run(tensors)

    return Captured(
        model.program, eager, example, model.structure, is_graph=True, signature=model.signature
    )


def _tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
