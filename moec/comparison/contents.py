"""What two artifacts hold, from their manifests and graphs; nothing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moec.comparison.comparison import ArtifactComparison, ComparedFact
from moec.comparison.graphs import aligned
from moec.exploration.explored_model import with_lines
from moec.exploration.weights import stored_weights
from moec.ir.graph import Graph
from moec.model.load import LoadedModel
from moec.model.stored import stored_graph
from moec.report.pass_graphs.table import GraphStep
from moec.report.units import counted
from moec.report.weight_formats import weight_formats
from moec.runtime.package import DECODE, MAIN

Graphs = Mapping[str, Graph]
Steps = tuple[GraphStep, ...]
COMPLETE = (  # also if equal
    "artifact", "target", "blocks", "functions", "error against eager", "format", "bytes",
)  # fmt: skip


def contents(a: LoadedModel, b: LoadedModel) -> ArtifactComparison:
    """Of two models that did not run. Raises ArtifactError where a graph is malformed."""
    graphs = [
        {n: stored_graph(m.path, n, t) for n, t in m.artifact.graphs.items() if n in (MAIN, DECODE)}
        for m in (a, b)
    ]
    one, two = _properties(a, graphs[0]), _properties(b, graphs[1])
    steps = {name: _steps((a, b), graphs, name) for name in dict.fromkeys((*graphs[0], *graphs[1]))}
    facts = tuple(
        ComparedFact(subject, name, ours.get(name), theirs.get(name))
        for subject in dict.fromkeys((*one, *two))
        for ours, theirs in [(one.get(subject, {}), two.get(subject, {}))]
        for name in dict.fromkeys((*ours, *theirs))
        if subject in COMPLETE or ours.get(name) != theirs.get(name)
    )
    altered = _altered(a, b, weight_formats(graphs[0][MAIN]).get("experts", {}))
    return ArtifactComparison(facts, altered, graphs=steps)


def _steps(models: Sequence[LoadedModel], graphs: Sequence[Graphs], name: str) -> Steps:
    """The graphs of one function, with lines."""
    lined = [
        with_lines(of[name], model.artifact.package.calls.get(name, ()))
        for model, of in zip(models, graphs, strict=True)
        if name in of
    ]
    sides = [side for side, of in zip("AB", graphs, strict=True) if name in of]
    shown = lined if len(lined) < 2 else aligned(*lined)
    return tuple(GraphStep(side, graph) for side, graph in zip(sides, shown, strict=True))


def _properties(model: LoadedModel, graphs: Mapping[str, Graph]) -> dict[str, dict[str, Any]]:
    """Values by subject and name."""
    manifest, package = model.artifact.manifest, model.artifact.package
    report = model.report()
    blocks = report.blocks
    choices = sorted({f"{block.top_k} of {block.experts}" for block in blocks})
    formats, parts = weight_formats(graphs[MAIN]), Counter[str]()
    for weight in stored_weights(manifest.arrays, graphs[MAIN]):
        parts[weight.kind] += weight.bytes
    for name, part in manifest.parts.items():
        parts[f"{name.partition('/')[0]}/"] += part.size
    return {
        "artifact": {"": model.path.name},
        "target": {"": manifest.target_name},
        "blocks": {"": ", ".join([counted(len(blocks), "MoE block"), *choices])},
        "functions": {"": ", ".join(package.functions)},
        "error against eager": {line.output: f"{line.error:.2g}" for line in report.verification},
        "format": {kind: ", ".join(sorted(set(of.values()))) for kind, of in formats.items()},
        "bytes": parts,
        **{f"ops of {n}": Counter(op.name for op in g.ops) for n, g in graphs.items()},
        "kernels": Counter(kernel for _, kernel in package.kernels),
        "sizes": {n: f"{low} to {high or 'any'}" for n, (low, high) in package.main.sizes.items()},
    }


def _altered(a: LoadedModel, b: LoadedModel, stacks: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The arrays of one dtype and shape whose digests differ; of stacks, the experts that do."""
    one, two = a.artifact, b.artifact
    lines: dict[str, tuple[int, ...]] = {}
    for name in sorted(one.manifest.arrays.keys() & two.manifest.arrays.keys()):
        x, y = one.manifest.arrays[name], two.manifest.arrays[name]
        digests = one.manifest.parts[x.part].sha256, two.manifest.parts[y.part].sha256
        if (x.dtype, x.shape) == (y.dtype, y.shape) and digests[0] != digests[1]:
            lines[name] = ()
            if name.removesuffix(".packed").partition("+")[0] in stacks:  # or several in one array
                rows = zip(one.package.arrays[name], two.package.arrays[name], strict=True)
                lines[name] = tuple(
                    e for e, (p, q) in enumerate(rows) if p.tobytes() != q.tobytes()
                )
    return lines
