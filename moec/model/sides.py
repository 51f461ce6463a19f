"""Programs for the sizes that `main` refuses, where the module takes the other side of a branch on
a size: `if tokens <= k: return dense(x)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from moec.capture.captured import other_sides, shown
from moec.codegen.lower import unsupported
from moec.ir.graph import Graph, Program, Value
from moec.model.bind_inputs import bound
from moec.model.clock import Clock
from moec.model.compiled import CompiledModel
from moec.model.forms import Passes, best_form
from moec.passes.core.runner import Declined
from moec.runtime.package import side

if TYPE_CHECKING:
    from moec.codegen.backend import Backend


def with_sides(
    compiled: CompiledModel, passes: Passes, exact: Sequence[Any], backend: Backend, clock: Clock
) -> CompiledModel:
    """The model with a program for each side of a branch on a size that `main` does not compute, as
    far as it can be captured and has kernels. `passes` and `exact` are those of `best_form`."""
    main = compiled.module.main
    if main.graph.states or not compiled.captured.beyond:
        return compiled
    forms, programs = [], {}
    with clock.phase("capture"):
        sides, refusals = other_sides(compiled.captured)
    for captured in sides:
        with clock.phase("passes"):
            form = best_form(bound(captured, exact), passes, exact, backend)
        program = form.pass_results[-1].program
        reason = unsupported(program.graph, backend)
        if not reason and _types(program.graph) != _types(main.graph):
            reason = "the types of its inputs or results are others there"
        if reason:
            refusals[shown([value.shape for value in captured.example])] = reason
            continue
        forms.append(form)
        programs[side(len(forms))] = program
    weights = dict(main.weights)
    for name, program in programs.items():
        programs[name] = sharing(program, weights, name)
        weights |= programs[name].weights
    blocks = {block.name: block for form in reversed(forms) for block in form.blocks}
    blocks |= {block.name: block for block in compiled.blocks}
    declined = (*compiled.declined, *(reason for form in forms for reason in form.declined))
    declined += tuple(Declined(where, reason, "sides") for where, reason in refusals.items())
    return replace(
        compiled,
        programs={**compiled.programs, **programs},
        sides=tuple(forms),
        blocks=tuple(blocks.values()),
        declined=tuple(dict.fromkeys(declined)),
    )


def _types(graph: Graph) -> list[tuple[str, str, int]]:
    values = (*graph.inputs, *graph.outputs)
    return [(value.name, value.dtype, len(value.shape)) for value in values]


def sharing(program: Program, weights: Mapping[str, torch.Tensor], prefix: str) -> Program:
    """The program with its equal weights as those of other programs, and another name for each that
    has the name of another weight."""
    graph = program.graph
    renamed = {
        param: Value(f"{prefix}.{param.name}", param.type)
        for param in graph.params
        if not _may_be(weights.get(param.name), program.weights[param.name])
    }

    def values(old: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(renamed.get(value, value) for value in old)

    tensors = {
        param.name: weights.get(param.name, program.weights[param.name])
        for param in graph.params
        if param not in renamed
    }
    tensors |= {new.name: program.weights[old.name] for old, new in renamed.items()}
    ops = tuple(replace(op, inputs=values(op.inputs)) for op in graph.ops)
    outputs = values(graph.outputs)
    graph = replace(graph, params=values(graph.params), ops=ops, outputs=outputs)
    return Program(graph, tensors)


def _may_be(other: torch.Tensor | None, weight: torch.Tensor) -> bool:
    """Whether a weight is equal to the other of its name, if there is one."""
    if other is None:
        return True
    alike = other.dtype == weight.dtype and other.shape == weight.shape
    return alike and (other.data_ptr() == weight.data_ptr() or torch.equal(other, weight))
