"""The graphs of a function of two artifacts, so that what is equal in both is the same text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import SequenceMatcher

from moec.ir.graph import Graph, Op, Value


def aligned(a: Graph, b: Graph) -> tuple[Graph, Graph]:
    """Both with the lines of either, and `b` with the names of `a` for the results of ops in the
    same place: passes number values, and one more would make all later ones differ.

    In the same place are ops of one name, module and types in a longest common sequence, and the
    ops of one that as many of the other replace, if their types are equal.
    """
    names: dict[Value, str] = {}
    lines: dict[Op, str] = {}
    one, two = ([(op.origin, op.name, _types(op)) for op in graph.ops] for graph in (a, b))
    for _, i, j, k, end in SequenceMatcher(None, one, two, autojunk=False).get_opcodes():
        if j - i != end - k:
            continue
        for x, y in zip(a.ops[i:j], b.ops[k:end], strict=True):
            if _types(x) == _types(y):
                names |= {y.outputs[n]: value.name for n, value in enumerate(x.outputs)}
                if x.name == y.name:  # lines are those of kernels, and not all ops are in one
                    lines |= dict.fromkeys((x, y), x.line or y.line)
    return _changed(a, {}, lines), _changed(b, names, lines)


def _types(op: Op) -> tuple[str, ...]:
    return tuple(str(value.type) for value in op.outputs)


def _changed(graph: Graph, names: Mapping[Value, str], lines: Mapping[Op, str]) -> Graph:
    """The graph with other names and lines; a name that another value gets has a prime."""
    new = {value: value for value in (*graph.inputs, *graph.params)}
    used = {value.name for value in new}
    shared = set(names.values())
    ops = []
    for op in graph.ops:
        for value in op.outputs:
            name = names.get(value, value.name)
            while name in used or (value not in names and name in shared):
                name += "'"
            used.add(name)
            new[value] = replace(value, name=name)
        read, written = ([new[v] for v in values] for values in (op.inputs, op.outputs))
        line = lines.get(op, op.line)
        ops.append(replace(op, inputs=tuple(read), outputs=tuple(written), line=line))
    outputs = tuple(new[value] for value in graph.outputs)
    return replace(graph, ops=tuple(ops), outputs=outputs, states=())
