"""The weights of a model: what reads them, their format and their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from moec.ir.graph import Graph, Op
from moec.report.quantisation import Formats, code_bits, weight_formats
from moec.runtime.artifact.manifest import Stored
from moec.runtime.dtypes import NUMPY

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
