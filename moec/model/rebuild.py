"""Compile an artifact's graph anew, to run it without the native code that it carries.

The weights stay as they are packed: the layout depends on the target only, so code made for
the same target reads them. Kernels that were tuned get the values that were recorded. This is
the one part of the runtime that needs the compiler, and with it torch.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import ArtifactError, IRError
from moec.runtime.artifact import Artifact, graph_part
from moec.runtime.package import CpuNeeds, Package


def rebuild(opened: Artifact) -> Package:
    """The package of the artifact with code that was compiled here and now.

    Raises ArtifactError where a graph of it is malformed, or moec would now pack its weights
    otherwise, and UnsupportedError where no kernel is known for an op.
    """
    from moec.codegen.build import compile_module
    from moec.codegen.cpu.link import linked
    from moec.codegen.cpu.tuning import of_dict
    from moec.codegen.lower import lower
    from moec.codegen.package import ports
    from moec.interpret.verifier import verify
    from moec.ir.graph import Module, Program, Stage
    from moec.ir.text import parse
    from moec.target import cpu as targets

    needs = opened.package.target
    target = targets.parse(needs.name)
    known = CpuNeeds(target.name, target.mcpu, target.mattr, target.mtriple, target.features)
    if known != needs:
        raise ArtifactError(
            f"{opened.path} was compiled for a target {needs.name!r} that this moec describes "
            "otherwise, so its weights may lie otherwise too; compile the model again"
        )
    if needs.name == targets.host().name:
        target = targets.host()  # the same code, blocked for this machine's cache

    def program(name: str) -> Program:
        try:
            graph = parse(opened.graphs[name])
            verify(graph, Stage.GROUPED)
        except IRError as error:
            part = graph_part(name)
            raise ArtifactError(f"{opened.path}: {part} is malformed: {error}") from error
        return Program(graph, {})

    package = opened.package
    try:
        tunings = {kernel: of_dict(values) for kernel, values in package.tunings.items()}
    except ValueError as error:
        raise ArtifactError(f"{opened.path} was tuned by another moec: {error}") from error
    module = Module({name: program(name) for name in package.functions})
    lowered = lower(module, target, tunings)
    if not tunings.keys() <= {kernel.key for kernel in lowered.tunable}:
        raise ArtifactError(
            f"{opened.path} was tuned for kernels that this moec makes otherwise; compile the "
            "model again"
        )
    for name, function in package.functions.items():
        if ports(lowered.params[name]) != function.params:
            raise ArtifactError(
                f"{opened.path} packs its weights as this moec does not; compile the model again"
            )
    return replace(package, library=linked(compile_module(lowered.module, target), target))
