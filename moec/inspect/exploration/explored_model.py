"""What a page shows: a compiled model, or an artifact that is not loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from moec.ir.graph import Graph, Op
from moec.model.compiled import CompiledModel
from moec.model.stored import stored_graph
from moec.report.data import ReportData
from moec.report.opened import open_artifact
from moec.report.pass_graphs.stored import StoredPasses, read_passes
from moec.report.pass_graphs.table import GraphStep, steps_of
from moec.report.quantisation import Formats, code_bits, weight_formats
from moec.runtime.artifact.artifact import PASSES
from moec.runtime.artifact.manifest import Stored
from moec.runtime.dtypes import NUMPY
from moec.runtime.package import MAIN, KernelCall, RecordedLayer

EMBEDDING = "embeddings"


@dataclass(frozen=True)
class WeightLine:
    """`module` and `kind` say what reads it first, `stored` is the dtype and shape in which it is
    stored."""

    name: str
    module: str
    kind: str
    format: str
    stored: str
    bytes: int


def stored_weights(arrays: Mapping[str, Stored], graph: Graph) -> tuple[WeightLine, ...]:
    """The arrays of an artifact, packed for its kernels; those of one part are counted once."""
    readers = _Readers.of(graph)
    parts: dict[str, WeightLine] = {}
    for name, array in arrays.items():
        first = name.removesuffix(".packed").partition("+")[0]  # or several weights in one array
        stored = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
        weight = WeightLine(name, *readers.of_weight(first, array.dtype), stored, array.nbytes)
        parts.setdefault(array.part, weight)
    return _by_bytes(parts.values())


def weights_of(graph: Graph) -> tuple[WeightLine, ...]:
    """The weights of a graph, for which no code was generated."""
    readers, bits = _Readers.of(graph), code_bits(graph)
    return _by_bytes(
        WeightLine(
            param.name,
            *readers.of_weight(param.name, param.dtype),
            str(param.type),
            prod(map(int, param.shape))
            * bits.get(param.name, 8 * NUMPY[param.dtype].itemsize)
            // 8,
        )
        for param in graph.params
    )


def _by_bytes(weights: Iterable[WeightLine]) -> tuple[WeightLine, ...]:
    return tuple(sorted(weights, key=lambda weight: -weight.bytes))


@dataclass(frozen=True)
class _Readers:
    """The formats of weights by what reads them, and by name the first op that reads each."""

    formats: Formats
    first: Mapping[str, Op]

    @staticmethod
    def of(graph: Graph) -> _Readers:
        first = {p.name: ops[0] for p in graph.params if (ops := graph.readers.get(p))}
        return _Readers(weight_formats(graph), first)

    def of_weight(self, name: str, dtype: str) -> tuple[str, str, str]:
        """Its module, kind and format."""
        op = self.first.get(name)
        module = op.origin if op else ""
        for kind, names in self.formats.items():
            if name in names and kind != "other weights":
                return module, kind, names[name]
        embeds = op is not None and op.name == "aten.embedding.default"
        form = self.formats.get("other weights", {}).get(name, dtype)
        return module, EMBEDDING if embeds else "other weights", form


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
