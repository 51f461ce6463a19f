"""Compile an artifact's graph anew, to run it without the native code that it carries.

The weights stay as they are packed: the layout depends on the target only, so code made for
the same target reads them. Kernels that were tuned get the values that were recorded. This is
the one part of the runtime that needs the compiler, and with it torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moec.errors import ArtifactError
from moec.runtime.artifact import Artifact, graph_part
from moec.runtime.package import DECODE, Function, Package

if TYPE_CHECKING:
    from moec.ir.graph import Program


def rebuild(opened: Artifact) -> Package:
    """The package of the artifact with code that was compiled here and now.

    Raises ArtifactError where a graph of it is malformed or contradicts the manifest, or moec would
    now pack its weights otherwise, and UnsupportedError where no kernel is known for an op.
    """
    from moec.codegen.backends import backend_for
    from moec.codegen.lower import lower
    from moec.codegen.package import ports
    from moec.ir.graph import Module, Program
    from moec.model.stored import stored_graph
    from moec.target import cpu
    from moec.target import named as targets

    needs = opened.package.target
    target = targets.parse(opened.package.target_name)
    if target.needs != needs:
        raise ArtifactError(
            f"{opened.path} was compiled for a target {needs.name!r} that this moec describes "
            "otherwise, so its weights may lie otherwise too; compile the model again"
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
    try:
        lowered = lower(module, target, backend, package.tunings)
    except ValueError as error:
        raise ArtifactError(f"{opened.path} was tuned by another moec: {error}") from error
    if not package.tunings.keys() <= {kernel.key for kernel in lowered.tunable}:
        raise ArtifactError(
            f"{opened.path} was tuned for kernels that this moec makes otherwise; compile the "
            "model again"
        )
    for name, function in package.functions.items():
        if ports(lowered.params[name]) != function.params:
            raise ArtifactError(
                f"{opened.path} packs its weights as this moec does not; compile the model again"
            )
    library = backend.library(lowered.module, target, 2, None)
    return replace(package, library=library.host, gpu=library.gpu)


def _check_signature(opened: Artifact, name: str, program: Program, function: Function) -> None:
    """Inputs are checked by the manifest, and new code bounds what it reads by its graph alone: a
    manifest that allows more than the graph would have it read outside of its tensors."""
    from moec.codegen.package import generation_of, signature

    states = tuple(replace(state, initial="") for state in function.states)
    expected = signature(name, program, function.params)
    generation = opened.package.generation if name == DECODE else None
    if expected == replace(function, states=states) and (
        generation is None or generation_of(expected) == replace(generation, stop=())
    ):
        return
    raise ArtifactError(
        f"{opened.path}: the manifest describes the function {name!r} otherwise than "
        f"{graph_part(name)} does, so one of them was altered; compile the model again"
    )
