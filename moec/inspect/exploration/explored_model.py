"""What a page shows: a compiled model, or an artifact that is not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moec.inspect.exploration.weights import WeightLine, stored_weights, weights_of
from moec.ir.graph import Graph
from moec.model.compiled import CompiledModel
from moec.model.stored import stored_graph
from moec.report.data import ReportData
from moec.report.opened import open_artifact
from moec.report.pass_graphs.stored import StoredPasses, read_passes
from moec.report.pass_graphs.table import GraphStep, steps_of
from moec.runtime.artifact.artifact import PASSES
from moec.runtime.package import MAIN, KernelCall, RecordedLayer

FINAL = "final graph"
RECORDED = "recorded"
"""How the names of functions begin that differ from others in the choices that they return."""


@dataclass(frozen=True)
class ExploredModel:
    """`functions` maps each function to its graph after each pass, or to the last one alone;
    `calls` are the calls of kernels of each function, none where no code was generated. `passes`
    are the graphs of `main` after each pass, where an artifact stores them."""

    name: str
    report: ReportData
    functions: Mapping[str, Sequence[GraphStep]]
    weights: tuple[WeightLine, ...]
    calls: Mapping[str, tuple[KernelCall, ...]] = field(default_factory=dict)
    recorded: tuple[RecordedLayer, ...] = ()
    artifact: bool = False
    passes: StoredPasses | None = None

    def routers(self) -> list[tuple[str, int]]:
        """The layers whose choices a trace of the model has, and the number of their experts."""
        if self.recorded:
            return [(layer.layer, layer.experts) for layer in self.recorded]
        return [(block.name, block.experts) for block in self.report.blocks]


def of_artifact(path: Path) -> ExploredModel:
    """The artifact's own account of itself, whose weights are not read. Raises ArtifactError where
    a part is missing, altered or malformed."""
    opened = open_artifact(path)
    manifest = opened.manifest
    package = manifest.package
    graphs = {}
    for name in package.functions:
        if not name.startswith(RECORDED):
            graph = stored_graph(path, name, opened.graph(name))
            graphs[name] = with_lines(graph, package.calls.get(name, ()))
    passes = opened.part(PASSES) if PASSES in manifest.parts else None
    return ExploredModel(
        path.name,
        opened.report(),
        {name: [GraphStep(FINAL, graph)] for name, graph in graphs.items()},
        stored_weights(manifest.arrays, graphs[MAIN]),
        {name: calls for name, calls in package.calls.items() if name in graphs},
        package.recorded,
        artifact=True,
        passes=None if passes is None else read_passes(path, passes, len(graphs[MAIN].ops)),
    )


def of_compiled(compiled: CompiledModel) -> ExploredModel:
    steps = list(steps_of(compiled.pass_results))
    package, last = compiled.package, compiled.pass_results[-1].program
    others = {
        name: [GraphStep(FINAL, program.graph)]
        for name, program in compiled.programs.items()
        if not name.startswith(RECORDED)
    }
    calls = package.calls if package else {}
    return ExploredModel(
        compiled.source.name,
        compiled.report(),
        {MAIN: steps, **others},
        weights_of(last.graph),
        {name: sites for name, sites in calls.items() if not name.startswith(RECORDED)},
        compiled.recorded,
    )


def with_lines(graph: Graph, calls: Iterable[KernelCall]) -> Graph:
    """The graph with the user's lines, which its text lacks and the calls of kernels have."""
    lines = {name: call.line for call in calls for name in call.ops}
    ops = (replace(op, line=lines.get(op.outputs[0].name, "")) for op in graph.ops)
    return replace(graph, ops=tuple(ops))
