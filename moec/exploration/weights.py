"""The weights of a model: what reads them, their format and their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moec.ir.graph import Graph
from moec.report.weight_formats import Formats, weight_formats
from moec.runtime.artifact.manifest import Stored
from moec.runtime.dtypes import NUMPY

EMBEDDING = "embeddings"


@dataclass(frozen=True)
class StoredWeight:
    """`kind` says what reads it, `stored` is the dtype and shape in which it is stored."""

    name: str
    kind: str
    format: str
    stored: str
    bytes: int


def stored_weights(arrays: Mapping[str, Stored], graph: Graph) -> tuple[StoredWeight, ...]:
    """The arrays of an artifact, packed for its kernels; those of one part are counted once."""
    formats, embeddings = weight_formats(graph), _embeddings(graph)
    parts: dict[str, StoredWeight] = {}
    for name, array in arrays.items():
        first = name.removesuffix(".packed").partition("+")[0]  # or several weights in one array
        kind, form = _kind_of(first, formats, embeddings, array.dtype)
        stored = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
        parts.setdefault(array.part, StoredWeight(name, kind, form, stored, array.nbytes))
    return tuple(sorted(parts.values(), key=lambda weight: -weight.bytes))


def weights_of(graph: Graph) -> tuple[StoredWeight, ...]:
    """The weights of a graph, for which no code was generated."""
    formats, embeddings = weight_formats(graph), _embeddings(graph)
    weights = []
    for param in graph.params:
        kind, form = _kind_of(param.name, formats, embeddings, param.dtype)
        nbytes = prod(int(size) for size in param.shape) * NUMPY[param.dtype].itemsize
        weights.append(StoredWeight(param.name, kind, form, str(param.type), nbytes))
    return tuple(sorted(weights, key=lambda weight: -weight.bytes))


def _embeddings(graph: Graph) -> set[str]:
    reads = (op for op in graph.ops if op.name == "aten.embedding.default")
    return {op.inputs[0].name for op in reads}


def _kind_of(name: str, formats: Formats, embeddings: set[str], dtype: str) -> tuple[str, str]:
    """What reads a weight, and its format."""
    for kind, names in formats.items():
        if name in names and kind != "other weights":
            return kind, names[name]
    form = formats.get("other weights", {}).get(name, dtype)
    return (EMBEDDING if name in embeddings else "other weights"), form
