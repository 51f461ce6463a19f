"""Graph[GROUPED] -> the nodes of an ONNX graph, op by op, by the table of builders."""

from __future__ import annotations

from dataclasses import dataclass

from moec.codegen.onnx.aten import lookup, matrix, pointwise, ranking, reduce, shape
from moec.codegen.onnx.moe import experts, moe_op, qmoe_op, quantised, routing, zero_experts
from moec.codegen.onnx.nn import attention, norm
from moec.codegen.onnx.profiles import Profile
from moec.codegen.onnx.rules import BUILD, Call
from moec.codegen.onnx.sizes import guard_sizes
from moec.codegen.onnx.writer import Node, NodeWriter
from moec.codegen.unsupported import fixed, line
from moec.errors import NoMatch, UnsupportedError
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.dispatch import SORTS

FILLED_BY = (
    *(attention, experts, lookup, matrix, norm, pointwise),
    *(quantised, ranking, reduce, routing, shape, zero_experts),
)
"""Modules that fill the table of builders when they are imported."""
MOE_FORMS = ("auto", "op", "rows")


@dataclass(frozen=True)
class OnnxGraph:
    """`choices` are the expert ids of each block: the graph's value and its ONNX name. `forms` maps
    each block's module to its form: "op" (MoE or QMoE) or "rows"."""

    graph: Graph
    writer: NodeWriter
    outputs: tuple[str, ...]
    choices: tuple[tuple[Value, str], ...]
    forms: dict[str, str]

    def nodes(self, extra: tuple[str, ...] = ()) -> list[Node]:
        return self.writer.live([*self.outputs, *extra])


def lower(graph: Graph, profile: Profile, opset: int, moe: str = "auto") -> OnnxGraph:
    """The ONNX graph. Raises UnsupportedError that lists every op without an ONNX form."""
    w = NodeWriter(graph, opset, profile.contrib)
    problems: dict[str, list[Op]] = {}
    if graph.states:
        names = ", ".join(state.before.name for state in graph.states[:3])
        raise UnsupportedError(
            f"the model keeps {len(graph.states)} buffers between calls ({names}), and an ONNX "
            "file cannot keep state: export it without a cache (use_cache=False)"
        )
    for value in graph.inputs:
        w.names[value] = w.reserve(value.name)
    guard_sizes(w)
    for value in graph.inputs:
        w.learn(value)
    outputs = [w.reserve(value.name) for value in graph.outputs]
    blocks, refused = _blocks(graph, profile, moe)
    for op, reason in refused:
        problems.setdefault(reason, []).append(op)
    for op in graph.ops:
        reason = _write(w, op, blocks)
        if reason:
            problems.setdefault(reason, []).append(op)
    lines = [line(reason, ops) for reason, ops in problems.items()]
    lines += fixed(graph)
    if lines:
        raise UnsupportedError(_message(lines))
    _name_outputs(w, graph, outputs)
    choices = tuple((v, w.names[v]) for v in _choices(graph))
    forms = {
        block_of(graph, op): "op" if op in blocks else "rows" for op in graph.ops if _combines(op)
    }
    return OnnxGraph(graph, w, tuple(outputs), choices, forms)


def _write(w: NodeWriter, op: Op, blocks: dict[Op, moe_op.Fused]) -> str:
    """Writes the nodes of one op and returns "", or the reason why it has no ONNX form. Its outputs
    get names in both cases, so that later ops can still be checked."""
    w.where, w.by = op.origin, op.name
    reason = ""
    try:
        if op in blocks:
            block = blocks[op]
            outputs: object = (qmoe_op if block.quantised else moe_op).write(w, op, block)
        else:
            reason = _refusal(op)
            outputs = "" if reason else BUILD[op.name](Call(w, op))
    except NoMatch as refused:
        reason, outputs = str(refused), ""
    if reason:
        names = [w.reserve(value.name) for value in op.outputs]
        if op.name in ("moe.sort", "moe.dispatch", "moe.even_ends"):
            w.memo["counts", op.outputs[-1]] = names[-1]
    else:
        names = [outputs] if isinstance(outputs, str) else list(outputs)  # type: ignore[call-overload]
    w.names |= dict(zip(op.outputs, names, strict=True))
    return reason


def _refusal(op: Op) -> str:
    if op.name not in BUILD:
        return f"operator {op.name} has no ONNX form"
    if any(v.dtype == "c64" for v in (*op.inputs, *op.outputs)):
        return f"operator {op.name} has no ONNX form for complex numbers"
    return ""


def _message(lines: list[str]) -> str:
    return (
        "the model cannot be exported to ONNX:\n"
        + "\n".join(f"  {text}" for text in lines)
        + "\nreplace these operations in the model, or export a part of the model without them"
    )


def _combines(op: Op) -> bool:
    return op.name == "moe.combine"


def block_of(graph: Graph, op: Op) -> str:
    """The module of the block that an op belongs to, which is that of its sorted rows."""
    producer: Op | None = op
    while producer is not None and producer.name not in SORTS:
        operand = 1 if producer.name == "moe.combine" else 0
        producer = (
            graph.producers.get(producer.inputs[operand])
            if len(producer.inputs) > operand
            else None
        )
    return (producer or op).origin.removesuffix(".experts") or "(whole model)"


def _choices(graph: Graph) -> list[Value]:
    """The expert ids that the sorts of the graph read, [T, k] each."""
    ids = [op.inputs[0] for op in graph.ops if op.name == "moe.sort"]
    return ids + [op.inputs[1] for op in graph.ops if op.name == "moe.dispatch"]


def _blocks(
    graph: Graph, profile: Profile, moe: str
) -> tuple[dict[Op, moe_op.Fused], list[tuple[Op, str]]]:
    """({last op of a block: its com.microsoft.MoE or QMoE}, [(last op, reason)] of the blocks for
    which moe="op" was requested but the operator lacks a feature)."""
    fused: dict[Op, moe_op.Fused] = {}
    refused: list[tuple[Op, str]] = []
    for op in filter(_combines, graph.ops):
        few = moe_op.is_quantised(graph, op)
        by_default = few or profile.op_by_default
        if not profile.contrib or not (moe == "op" or (moe == "auto" and by_default)):
            continue
        try:
            fused[op] = moe_op.match(graph, op)
            if few:
                qmoe_op.check(fused[op])
        except NoMatch as reason:
            fused.pop(op, None)
            name = "QMoE" if few else "MoE"
            message = f'com.microsoft.{name} cannot express the block: {reason}; leave out moe="op"'
            refused.append((op, message))
    return fused, refused if moe == "op" else []


def _name_outputs(w: NodeWriter, graph: Graph, outputs: list[str]) -> None:
    """Gives the outputs their names. A result that is an input, a weight or another result gets an
    Identity; any other result is renamed at its node."""
    producers = {name: node for node in w.nodes for name in node.outputs}
    renames: dict[str, str] = {}
    w.where = w.by = ""
    for value, target in zip(graph.outputs, outputs, strict=True):
        name = w.read(value)
        if name in producers and name not in renames:
            renames[name] = target
        else:
            w.nodes.append(Node("Identity", [name], [target], target, {}))
    for node in w.nodes:
        node.inputs[:] = [renames.get(name, name) for name in node.inputs]
        node.outputs[:] = [renames.get(name, name) for name in node.outputs]
    for value, name in w.names.items():
        w.names[value] = renames.get(name, name)
