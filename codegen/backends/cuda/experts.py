"""What the kernels of all products of experts need of an op, in whatever form its weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

from moec.codegen.backend import require
from moec.codegen.backends.cuda.bodies import check_body
from moec.codegen.rules.experts import check_sorted
from moec.codegen.rules.products import only_owned_rows_read
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.grouped import Grouped


def check_experts(op: Op, parts: Grouped[Any], stored: Iterable[Value], graph: Graph) -> None:
    """Raises NoMatch for products that no kernel supports. `stored` are the tensors of the
    stacks."""
    count = len(parts.matrices)
    require(count <= 2, f"it multiplies the rows by {count} stacks, and the kernel supports two")
    constant = set(graph.params).issuperset((*stored, *parts.biases))
    require(constant, "a stack of its weights is computed, not a weight of the model")
    require(parts.scale is None, "its rows are scaled before they are multiplied")
    check_sorted(parts.ends, parts.order, parts.x, cast(int, op.attrs.get("gather", 0)), graph)
    if op.body is not None:
        check_body(op.body)


def of_owned_rows(check: Callable[[Op, Graph], Any]) -> Callable[[Op, Graph], None]:
    """A rule's check: check(op, graph), and that only rows of experts are read."""

    def fits(graph: Graph, op: Op) -> bool:
        try:
            check(op, graph)
        except NoMatch:
            return False
        return True

    def checked(op: Op, graph: Graph) -> None:
        check(op, graph)
        owned = only_owned_rows_read(op.outputs[0], graph, partial(fits, graph), op.name)
        reason = "rows that belong to no expert are read, and the kernel does not compute them"
        require(owned, reason)

    return checked
