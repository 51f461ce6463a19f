"""Compiles an artifact's graph again, to run it without the native code in it.

The packed weights are reused: their layout depends only on the target, so code for the same target
can read them. This is the only part of the runtime that
needs the compiler, and therefore torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from moec.errors import ArtifactError
from moec.runtime.artifact.artifact import Artifact, graph_part
from moec.runtime.package import DECODE, Function, KernelCall, Package

if TYPE_CHECKING:
    from moec.ir.graph import Program

Calls: TypeAlias = Mapping[str, tuple[KernelCall, ...]]


def rebuild(opened: Artifact) -> Package:
    """The package of the artifact with newly compiled code.

    Raises ArtifactError where a graph of it is malformed or contradicts the manifest, or where this
    version of moec packs weights differently, and UnsupportedError where an op has no kernel.
    """
    from moec.codegen.backends import backend_for
    from moec.codegen.lower import lower
    from moec.codegen.package import ports, stored_experts
    from moec.ir.graph import Module, Program
    from moec.model.stored import stored_graph
    from moec.target import cpu
    from moec.target import named as targets

    needs = opened.package.target
    target = targets.parse(opened.package.target_name)
    if target.needs != needs:
        raise ArtifactError(
            f"{opened.path} was compiled for a target {needs.name!r} that this version of moec "
            "defines differently, so its weights may be packed differently; compile the model "
            "again"
        )
    if target.name == cpu.host().name:
        target = cpu.host()  # the same code, blocked for this machine's cache

    def program(name: str) -> Program:
        return Program(stored_graph(opened.path, name, opened.graphs[name]), {})

    package = opened.package
    module = Module({name: program(name) for name in package.functions})
    for name, function in package.functions.items():
        _check_signature(opened, name, module[name], function)
    backend = backend_for(target)
    lowered = lower(module, target, backend, store=package.store is not None)
    same = (ports(lowered.params[n]) == f.params for n, f in package.functions.items())
    if not all(same) or stored_experts(module, lowered) != package.store:
        raise ArtifactError(
            f"{opened.path} has its weights in a layout of another version of moec; compile "
            "the model again"
        )
    library = backend.library(lowered.modules, target, 2, None)
    calls = {} if library.gpu else _with_lines(lowered.calls, package.calls)
    return replace(package, library=library.host, gpu=library.gpu, calls=calls)


def _with_lines(calls: Calls, stored: Calls) -> Calls:
    """The calls of new code, with the user's lines of the ops in the artifact: graphs have none."""
    lines = {(name, c.ops): c.line for name, of_name in stored.items() for c in of_name}
    return {
        name: tuple(replace(c, line=lines.get((name, c.ops), "")) for c in of_name)
        for name, of_name in calls.items()
    }


def _check_signature(opened: Artifact, name: str, program: Program, function: Function) -> None:
    """Raises ArtifactError where manifest and graph disagree. Inputs are checked against the
    manifest, while new code relies on the graph; if the manifest allowed more, code would read out
    of bounds."""
    from moec.codegen.package import generation_of, signature

    states = tuple(replace(state, initial="") for state in function.states)
    expected = signature(name, program, function.params)
    generation = opened.package.generation if name == DECODE else None
    if expected == replace(function, states=states) and (
        generation is None or generation_of(expected) == replace(generation, stop=())
    ):
        return
    raise ArtifactError(
        f"{opened.path}: the manifest describes the function {name!r} differently from "
        f"{graph_part(name)}, so one of them was altered; compile the model again"
    )
