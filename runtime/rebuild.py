"""Compile an artifact's graph anew, to run it without the native code that it carries.

The weights stay as they are packed: the layout depends on the target only, so code made for
the same target reads them. This is the one part of the runtime that needs the compiler, and
with it torch.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import ArtifactError, IRError
from moec.runtime.artifact import Artifact
from moec.runtime.package import CpuNeeds, Package, Port


def rebuild(opened: Artifact) -> Package:
    """The package of the artifact with code that was compiled here and now.

    Raises ArtifactError where its graph is malformed, or moec would now pack its weights
    otherwise, and UnsupportedError where no kernel is known for an op.
    """
    from moec import target as targets
    from moec.codegen.build import compile_module
    from moec.codegen.lower import lower
    from moec.codegen.package import export
    from moec.ir import Stage
    from moec.text import parse
    from moec.verify import verify

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
    try:
        graph = parse(opened.graph_text)
        verify(graph, Stage.GROUPED)
    except IRError as error:
        raise ArtifactError(f"{opened.path}: graph.moec is malformed: {error}") from error
    lowered = lower(graph, target)
    params = tuple(
        Port(p.name, p.type.dtype, tuple(d if isinstance(d, int) else str(d) for d in p.type.shape))
        for p in lowered.params
    )
    if params != opened.package.params:
        raise ArtifactError(
            f"{opened.path} packs its weights as this moec does not; compile the model again"
        )
    return replace(opened.package, library=export(compile_module(lowered.module, target)))
