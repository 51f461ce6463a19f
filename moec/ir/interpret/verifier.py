"""The verifier: the rules of every graph, checked after every pass."""

from __future__ import annotations

from moec.dtypes import DTYPES
from moec.errors import IRError
from moec.ir.aten import refs
from moec.ir.graph import Graph, Op, Stage, TensorType, Value
from moec.ir.opdef import OpDef
from moec.ir.ops import OPS


def verify(graph: Graph, stage: Stage) -> None:
    """Check that every value is defined once and before it is read, that names are unique, that
    ops belong to the stage, and that the types of moec's own ops follow from their inputs.

    Raises IRError, naming the op and the rule.
    """
    _verify(graph, stage, set())


def _verify(graph: Graph, stage: Stage, names: set[str]) -> None:
    defined: set[Value] = set()
    names = set(names)

    def define(value: Value, where: object) -> None:  # `where` is text only in errors
        if value in defined:
            raise IRError(f"{where}: {value.name} is defined twice")
        if value.name in names:
            raise IRError(f"{where}: the name {value.name} is taken")
        if value.dtype not in DTYPES:
            raise IRError(f"{where}: {value.name} has unknown dtype {value.dtype}")
        defined.add(value)
        names.add(value.name)

    for value in (*graph.inputs, *graph.params):
        define(value, f"graph {graph.name}")
    for op in graph.ops:
        for value in op.inputs:
            if value not in defined:
                raise IRError(f"{op}: reads {value.name} before it is defined")
        _verify_op(op, stage)
        if op.body is not None:
            _verify(op.body, stage, set())
        for value in op.outputs:
            define(value, op)
    for value in graph.results:
        if value not in defined:
            raise IRError(f"graph {graph.name}: returns {value.name}, which nothing defines")
    for state in graph.states:
        if state.before not in graph.inputs:
            raise IRError(f"graph {graph.name}: state {state.before.name} is not an input")
        if state.before.type != state.after.type:
            raise IRError(f"graph {graph.name}: state {state.before} becomes {state.after}")


def _verify_op(op: Op, stage: Stage) -> None:
    if not op.name.startswith(stage.value):
        raise IRError(f"{op}: does not belong in stage {stage.name}")
    for name, attr in op.attrs.items():
        for ref in refs(attr):
            if not 0 <= ref.index < len(op.inputs):
                raise IRError(f"{op}: {name} refers to input {ref.index} of {len(op.inputs)}")
    definition = OPS.get(op.name)
    if definition is None:
        if not op.name.startswith(("aten.", "moec.")):
            raise IRError(f"{op}: no such op")
        return
    expected = _inferred(op, definition)
    actual = tuple(value.type for value in op.outputs)
    if expected != actual:
        shown = [", ".join(map(str, types)) for types in (actual, expected)]
        raise IRError(f"{op}: is {shown[0]}, but its inputs make it {shown[1]}")


def _inferred(op: Op, definition: OpDef) -> tuple[TensorType, ...]:
    """The types that an op's rule infers. Raises IRError too where the rule fails on malformed
    inputs or attributes, which an untrusted graph may have."""
    try:
        return definition.infer(op)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise IRError(f"{op}: its inputs or attributes are not what it takes: {error}") from error
