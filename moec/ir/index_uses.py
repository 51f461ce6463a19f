"""Which integers of a graph index an axis, and how long that axis is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moec.dtypes import INDEX_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, product

REQUIRE = "moec.require_index"


@dataclass(frozen=True)
class IndexUse:
    """`ids` index an axis of `size`; with `negative`, they may count from its end."""

    ids: Value
    size: Dim
    negative: bool = False


_ALONG_AN_AXIS = frozenset(
    f"aten.{name}"
    for name in (
        *("index_select.default", "gather.default", "index_add.default", "index_copy.default"),
        *("scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce"),
        *("scatter_add.default", "scatter_reduce.two"),
    )
)
_FILLS = frozenset({"aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor"})
_LISTS = frozenset({"aten.index.Tensor", "aten.index_put.default", "aten._index_put_impl.default"})


def index_uses(op: Op) -> Iterator[IndexUse]:
    """The indices that an op reads or writes at, for which eager raises where they are beyond their
    axis, and for most ops where they are negative."""
    for use in _uses(op):
        if use.ids.dtype in INDEX_DTYPES:
            yield use


def _uses(op: Op) -> Iterator[IndexUse]:
    if op.name == REQUIRE:
        rows: Any = op.attrs["rows"]
        yield IndexUse(op.inputs[0], rows, bool(op.attrs["negative"]))
    elif op.name == "aten.embedding.default":
        arguments = named(op)
        yield IndexUse(arguments["indices"], arguments["weight"].shape[0])
    elif op.name in _ALONG_AN_AXIS | _FILLS:
        arguments = named(op)
        table = arguments["self"]
        if table.shape:
            yield IndexUse(arguments["index"], table.shape[arguments["dim"]], op.name in _FILLS)
    elif op.name == "aten.take.default":
        arguments = named(op)
        yield IndexUse(arguments["index"], product(arguments["self"].shape), True)
    elif op.name in _LISTS:
        arguments = named(op)
        for axis, ids in enumerate(arguments["indices"]):
            if ids is not None:
                yield IndexUse(ids, arguments["self"].shape[axis], True)
    elif op.name == "aten.bincount.default":
        yield IndexUse(op.inputs[0], op.outputs[0].shape[0])
