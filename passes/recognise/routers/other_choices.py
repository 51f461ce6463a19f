"""Choices and mixtures that belong to no recognised block, reported so that none goes unmentioned.

Masked attention heads and tokens that a layer skips (mixture of depths) are chosen by the same ops
as experts. A graph with such a choice and no block gets a report that names the choice. A softmax
may weigh the results of layers that read different rows (the second level of PLE), the weights of
experts (SMEAR, arXiv 2306.03745), or rows of a parameter (mixtures of vectors): none is a block of
experts.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.ir.graph import Op, Value
from moec.ir.traits import CHOICES, THROUGH
from moec.passes.recognise.reading.opnames import ACROSS, MULTIPLY, PRODUCTS
from moec.passes.recognise.region import Scope

RULE = "other-choices"
"""The rule under which the reasons are logged: if a model is compiled in pieces, the experts may be
in another piece."""
_COMPARISONS = ("aten.gt.", "aten.ge.", "aten.lt.", "aten.le.")
_LISTS = frozenset({"aten.nonzero.default", "aten.where.self"})
"""Ops that give the positions of rows for which a condition holds."""
_MOST_EXPERTS = 1024
"""A choice among more is one of words in a vocabulary."""


def other_choices(scope: Scope) -> Iterator[tuple[Op, str]]:
    """Choices whose results the graph reads, each with a text that says what is chosen."""
    for op in scope.graph.ops:
        if op.name not in CHOICES or op.inputs[0].dtype not in FLOATS or not op.inputs[0].shape:
            continue
        if not any(scope.graph.readers.get(value) for value in op.outputs):
            continue
        dim = op.attrs.get("dim", -1)
        among = op.inputs[0].shape[dim if isinstance(dim, int) else -1]
        if not isinstance(among, int):
            yield op, f"{op.name} chooses among {among} rows: it chooses rows, not experts"
        elif 1 < among <= _MOST_EXPERTS:
            yield (
                op,
                f"{op.name} chooses among {among}, and the choices are not experts: no product "
                "with weights of a single choice follows",
            )
    yield from dict(_thresholds(scope)).items()


def _thresholds(scope: Scope) -> Iterator[tuple[Op, str]]:
    """Comparisons that list the rows of one network, as in layers that tokens skip."""
    for op in scope.graph.ops:
        if op.name not in _LISTS or op.outputs[0].dtype not in INDEX_DTYPES:
            continue
        compare = scope.maker(scope.source_of(op.inputs[0], THROUGH))
        if compare is not None and compare.name.startswith(_COMPARISONS):
            if compare.inputs[0].dtype in FLOATS:
                yield (
                    compare,
                    f"{compare.name} lists rows by a threshold, and they go through one network or "
                    "none: there are no experts to choose among",
                )


def other_mixtures(scope: Scope, covered: Container[Op]) -> Iterator[tuple[Op, str]]:
    """Products outside of the ops `covered` in which a softmax over N columns weighs N values, each
    with a text that says what they are."""
    for op in scope.graph.ops:
        if op.name not in ACROSS or not op.name.endswith(("softmax.int", "softmax.default")):
            continue
        count, last = op.outputs[0].shape[-1], len(op.outputs[0].shape) - 1
        if not isinstance(count, int) or not 1 < count <= _MOST_EXPERTS:
            continue
        if op.attrs.get("dim") not in (-1, last):
            continue
        for product in _products(scope, op.outputs[0]):
            sources = [scope.source_of(value, THROUGH) for value in product.inputs]
            sources = sources if product not in covered else []
            texts = [_weighed(scope, value, count) for value in sources[:2]]
            if product.name in MULTIPLY:
                texts += [_parts(scope, value, count) for value in sources]
            yield from ((product, text) for text in texts if text)


def _parts(scope: Scope, value: Value, count: int) -> str:
    """What a softmax weighs in the rows of a product that have several parts, each of `count`."""
    layer = scope.made_by(value, *PRODUCTS)
    width = value.shape[-1] if value.shape else 1
    if layer is None or not isinstance(width, int) or width <= count or width % count:
        return ""
    if not any(operand in scope.constants for operand in layer.inputs):
        return ""
    return (
        f"a softmax weighs {count} parts of each row of {value.name}: the experts are columns of "
        "one matrix, which is multiplied at once"
    )


def _products(scope: Scope, weights: Value) -> Iterator[Op]:
    """The products that read `weights`, also after other views of its elements."""
    waiting = [weights]
    while waiting:
        for reader in scope.graph.readers.get(waiting.pop(), ()):
            if reader.name in THROUGH:
                waiting += reader.outputs
            elif reader.name in PRODUCTS or reader.name in MULTIPLY:
                yield reader


def _weighed(scope: Scope, value: Value, count: int) -> str:
    """What `count` columns of a softmax weigh in `value`; empty if it is not so many values."""
    stack = scope.made_by(value, "aten.stack.default", "aten.cat.default")
    if stack is not None and len(stack.inputs) == count:
        return (
            f"a softmax weighs {count} results, {stack.inputs[0].name} to "
            f"{stack.inputs[-1].name}, which are not experts of one kind that read the same rows"
        )
    if value not in scope.params or value.shape[:1] != (count,) or value.dtype not in FLOATS:
        return ""
    if len(value.shape) > 2:
        return (
            f"a softmax averages the weights of {count} experts, {value.name}, into one expert "
            "before any row is multiplied (soft merging): nothing is dispatched"
        )
    return f"a softmax weighs the {count} rows of {value.name}: vectors, not experts"
