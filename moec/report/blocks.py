"""Descriptions of the MoE blocks of a graph: what was recognised, and its size."""

from __future__ import annotations

from typing import cast

from moec.dtypes import INDEX_DTYPES
from moec.ir.graph import Graph, Op, Value
from moec.ir.index_uses import REQUIRE
from moec.ir.opdef import integer
from moec.ir.ops.experts.dispatch import chooses_all
from moec.ir.ops.experts.soft_mixture import slots_of
from moec.ir.ops.experts.zero_experts import KINDS
from moec.ir.ops.routing.gate import groups_of
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import product
from moec.report.data import WHOLE, Block

_ROUTERS = ("moe.route", "moe.gate")
_PICKS = "aten.index.Tensor"
_MOVES = (
    "aten.reshape.default",
    "aten.expand.default",
    "aten._to_copy.default",
    "aten.alias.default",
)
_REARRANGES = (*_MOVES, "aten.permute.default")
_PARTS = ("aten.select.int", "aten.slice.Tensor")
_REPLACING = ("where", "index_put", "masked_fill", "scatter", "cat", "mul")
_SILENT = {
    "linear",
    "slice",
    "split_with_sizes",
    "select",
    "reshape",
    "permute",
    "alias",
    "_to_copy",
}
_SCALING = {"mul", "add", "sub", "div"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "sigmoid": "glu"}


def blocks(graph: Graph) -> tuple[Block, ...]:
    """The blocks of a graph in stage MOE, in order."""
    kinds = {
        "moe.experts": _block,
        "moe.mixture": _mixture,
        "moe.hierarchy": _hierarchy,
        "moe.soft_mixture": _soft_mixture,
        "moe.neurons": _neurons,
    }
    return tuple(kinds[op.name](graph, op) for op in graph.ops if op.name in kinds)


def _block(graph: Graph, op: Op) -> Block:
    dispatch = graph.producers[op.inputs[1]]
    combine = next(
        (r for r in graph.readers.get(op.outputs[0], ()) if r.name == "moe.combine"), None
    )
    experts = cast(int, dispatch.attrs["num_experts"])
    slots = [dispatch.inputs[1].shape[1]] + ([combine.attrs["k"]] if combine is not None else [])
    top_k = max(cast("list[int]", slots))
    total = sum(cast(int, product(stack.shape)) for stack in op.inputs[2:])
    assert op.body is not None
    return Block(
        name=op.origin.removesuffix(".experts") or WHOLE,
        experts=experts,
        top_k=top_k,
        router=_router(graph, dispatch),
        activation=activation(op.body),
        form=str(op.attrs.get("form", "moe.experts")),
        parameters=total,
        active_parameters=total * top_k // experts,
        shared=_shared(graph, combine) if combine is not None else "",
        zero=_zero(graph, dispatch),
    )


def _mixture(graph: Graph, op: Op) -> Block:
    """A mixture of different experts, all of which are used."""
    assert op.body is not None
    experts = len(op.body.outputs)
    total = sum(cast(int, product(param.shape)) for param in op.body.params)
    return Block(
        name=op.origin or WHOLE,
        experts=experts,
        top_k=experts,
        router="softmax, all",
        activation="of different kinds",
        form=str(op.attrs["form"]),
        parameters=total,
        active_parameters=total,
    )


def _hierarchy(graph: Graph, op: Op) -> Block:
    """A hierarchy, in which all experts are used. Where one linear layer computes the results of
    all experts, its parameters count as theirs."""
    groups = groups_of(op)
    layer = graph.producers.get(op.inputs[0])
    linear = layer is not None and layer.name == "aten.linear.default"
    stacks = layer.inputs[1:] if layer is not None and linear else ()
    total = sum(cast(int, product(stack.shape)) for stack in stacks)
    return Block(
        name=op.origin or WHOLE,
        experts=sum(groups),
        top_k=sum(groups),
        router=f"softmax within {_with_noun(len(groups), 'group')}, each weighed",
        activation="linear" if linear else "computed",
        form="all experts, weighed at two levels",
        parameters=total,
        active_parameters=total,
    )


def _soft_mixture(graph: Graph, op: Op) -> Block:
    """A soft mixture: every token contributes to every slot, every slot to every token's result."""
    assert op.body is not None
    experts, slots = integer(op, "num_experts"), slots_of(op)
    total = sum(cast(int, product(stack.shape)) for stack in op.inputs[3:])
    apart = "" if op.inputs[1] is op.inputs[2] else ", each of logits of its own"
    return Block(
        name=op.origin.removesuffix(".experts") or WHOLE,
        experts=experts,
        top_k=experts,
        router=f"softmax over tokens, softmax over slots{apart}",
        activation=activation(op.body),
        form=f"soft mixture of {_with_noun(experts, 'expert')} with {_with_noun(slots, 'slot')}",
        parameters=total,
        active_parameters=total,
    )


def _neurons(graph: Graph, op: Op) -> Block:
    """Experts of one neuron: each is one row of two tables."""
    assert op.body is not None
    tables, k = op.inputs[3:], cast(int, op.inputs[1].shape[1])
    experts = cast(int, tables[0].shape[0])
    total = sum(cast(int, product(table.shape)) for table in tables)
    return Block(
        name=op.origin or WHOLE,
        experts=experts,
        top_k=k,
        router="custom",
        activation=activation(op.body),
        form="experts of one neuron",
        parameters=total,
        active_parameters=total * k // experts,
    )


def _with_noun(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _zero(graph: Graph, dispatch: Op) -> str:
    """The experts without a network that the router may choose: "1 copy, 2 constant, 1 zero"."""
    readers = graph.readers[dispatch.inputs[1]]
    kinds = [
        str(kind)
        for op in readers
        if op.name == "moe.zero_experts"
        for kind in cast("tuple[str, ...]", op.attrs["kinds"])
    ]
    first = cast(int, dispatch.attrs["num_experts"])
    route = graph.producers.get(dispatch.inputs[1])
    if route is not None and route.name == "moe.route":
        among = cast(int, route.inputs[0].shape[-1])
        kinds += ["zero"] * (among - first - len(kinds))
    return ", ".join(f"{n} {kind}" for kind in KINDS[::-1] if (n := kinds.count(kind)))


def _router(graph: Graph, dispatch: Op) -> str:
    if chooses_all(graph, dispatch):
        return _gates(graph, dispatch)
    ids, after = dispatch.inputs[1], dict[str, None]()
    behind = _ops_behind(graph, ids)
    route = next((op for op in behind if op.name in _ROUTERS), None)
    for op in behind if route is not None else ():
        if op.name == "moe.force":
            after[f"the last forced by {_moved(graph, op.inputs[3]).name}"] = None
        elif op.name == "moe.capacity":
            ordered = graph.producers.get(op.inputs[0])
            order = " in the order of numbers" if ordered and ordered.name == _PICKS else ""
            limit = f"at most {op.attrs['capacity']} per expert"
            after[f"{limit}, by {op.attrs['order']}{order}"] = None
        elif op.name.split(".")[1] in _REPLACING:
            after["some choices replaced"] = None
    if len(dispatch.inputs) > 2:
        after["weights on the input"] = None
    weights = _weights(graph, dispatch)
    if route is not None and weights is not None and graph.producers.get(weights) not in behind:
        read = graph.readers.get(route.outputs[0])
        after["weights changed" if read else "weights of its own"] = None
    return ", ".join([_without_scores(graph, ids) if route is None else phrase(route), *after])


def _weights(graph: Graph, dispatch: Op) -> Value | None:
    """The weights of a block's choices, before they were moved."""
    readers = graph.readers.get(dispatch.outputs[1], ())
    read = [op.inputs[2] for op in readers if op.attrs.get("weighted")]
    return next((_moved(graph, value) for value in (*dispatch.inputs[2:], *read)), None)


def _ops_behind(graph: Graph, ids: Value) -> list[Op]:
    """The ops behind choices, through whole numbers and flags, nearest first, back to a router."""
    ops: dict[Op, None] = {}
    waiting = [ids]
    for value in waiting:
        op = graph.producers.get(value)
        if op is not None and op not in ops:
            ops[op] = None
            if op.name not in _ROUTERS:
                waiting += [v for v in op.inputs if v.dtype in (*INDEX_DTYPES, "bool")]
    return list(ops)


def _without_scores(graph: Graph, ids: Value) -> str:
    """ "hash of input_ids", where experts are computed from inputs of whole numbers alone."""
    read = {ids, *(value for op in _ops_behind(graph, ids) for value in op.inputs)}
    if any(value.dtype not in (*INDEX_DTYPES, "bool") for value in read):
        return "custom"
    names = [value.name for value in graph.inputs if value in read]
    return f"hash of {' and '.join(names)}" if names else "the same experts for all tokens"


def _gates(graph: Graph, dispatch: Op) -> str:
    """How the results of all experts are weighed, and by how many gates."""
    experts = [r for r in graph.readers.get(dispatch.outputs[0], ()) if r.name == "moe.experts"]
    readers = [reader for op in experts for reader in graph.readers.get(op.outputs[0], ())]
    sums = [op for op in readers if op.name == "moe.combine"]
    weighed = [op.inputs[2] for op in sums if op.attrs.get("weighted")]
    soft = weighed and all(_is_softmax(graph, value) for value in weighed)
    gates = f", {len(sums)} gates" if len(sums) > 1 else ""
    return f"{'softmax' if soft else 'custom'}, all{gates}"


def _is_softmax(graph: Graph, weights: Value) -> bool:
    op = graph.producers.get(weights)
    while op is not None and (op.name in _REARRANGES or _picks_gate(op)):
        op = graph.producers.get(op.inputs[0])
    return op is not None and op.name in ("aten.softmax.int", "aten._softmax.default")


def _picks_gate(op: Op) -> bool:
    """Whether the op picks some of several gates, and leaves the axis of experts, the last one."""
    last = len(op.inputs[0].shape) - 1 if op.inputs else 0
    return op.name in _PARTS and op.attrs.get("dim", 0) not in (-1, last)


def _moved(graph: Graph, value: Value) -> Value:
    """The value that was moved to be `value`."""
    while (op := graph.producers.get(value)) is not None and op.name in (*_MOVES, REQUIRE):
        value = op.inputs[0]
    return value


def phrase(op: Op) -> str:
    """A router in words, in the order of its steps."""
    routing = Routing.of(op)
    corrected = len(op.inputs) > 1 if op.name == "moe.route" else bool(op.attrs.get("corrected"))
    parts = [] if routing.score == "none" else [routing.score]
    if corrected:
        parts.append("correction bias")
    if routing.groups > 1:
        parts.append(
            f"best {routing.top_groups} of {routing.groups} groups by {routing.group_score}"
        )
    parts.append(f"top-{routing.k}")
    if routing.after != "none":
        parts.append(routing.after)
    if routing.renormalize:
        parts.append("renormalised")
    if routing.scale != 1.0:
        parts.append(f"times {routing.scale:g}")
    return ", ".join(parts)


def activation(body: Graph) -> str:
    """The activation between the linear layers of an expert, in words."""
    kinds: dict[str, Op] = {}
    for op in body.ops:
        kind = op.name.split(".")[1]
        weights = [v for v in op.inputs if v in body.params]
        if kind in _SILENT or (kind in _SCALING and (len(op.inputs) < 2 or weights)):
            continue  # biases, gains and constant factors are no activation
        kinds[kind] = op
    names = set(kinds)
    if not names:
        return "linear"
    functions = names - {"mul", "add", "clamp"}
    if len(functions) != 1 or "add" in names:
        return "custom"
    (function,) = functions
    clamped = "clamped " if "clamp" in names else ""
    if "mul" not in names:
        return clamped + function
    if function == "sigmoid" and _multiplies_itself(body, kinds["sigmoid"]):
        products = [o for o in body.ops if o.name == "aten.mul.Tensor" and len(o.inputs) == 2]
        return clamped + ("swiglu" if len(products) > 1 else "silu")
    if function == "relu" and len(set(kinds["mul"].inputs)) == 1:
        return clamped + "relu squared"
    return clamped + _GATED.get(function, "custom")


def _multiplies_itself(body: Graph, sigmoid: Op) -> bool:
    """Whether it computes x * sigmoid(x) or x * sigmoid(a * x)."""
    source = sigmoid.inputs[0]
    scaled = body.producers.get(source)
    sources: set[Value] = {source}
    if scaled is not None and scaled.name == "aten.mul.Tensor" and len(scaled.inputs) == 1:
        sources.add(scaled.inputs[0])
    readers = body.readers.get(sigmoid.outputs[0], ())
    return any(op.name == "aten.mul.Tensor" and sources & set(op.inputs) for op in readers)


def _shared(graph: Graph, combine: Op) -> str:
    if combine.attrs.get("added"):
        shared = _dense(graph, combine.inputs[-1])
        return shared and shared + _divisor(graph, combine.outputs[0])
    value = combine.outputs[0]
    while True:
        readers = graph.readers.get(value, ())
        if len(readers) != 1:
            return ""
        (reader,) = readers
        if reader.name in _MOVES:
            value = reader.outputs[0]
        elif reader.name == "aten.add.Tensor" and len(reader.inputs) == 2:
            shared = _dense(graph, next((v for v in reader.inputs if v is not value), value))
            return shared and shared + _divisor(graph, reader.outputs[0])
        else:
            return ""


def _divisor(graph: Graph, total: Value) -> str:
    """The divisor of the sum of the routed and the dense branch, in words; "" without one."""
    readers = graph.readers.get(total, ())
    if len(readers) == 1 and readers[0].name == "aten.div.Tensor" and len(readers[0].inputs) == 1:
        return f", the sum divided by {readers[0].attrs['other']}"
    return ""


def _dense(graph: Graph, value: Value) -> str:
    """The kind of the dense branch that is added; "" for a residual connection."""
    op = graph.producers.get(value)
    while op is not None and op.name in _MOVES:
        op = graph.producers.get(op.inputs[0])
    if op is None:
        return ""
    if op.name == "aten.linear.default":
        return "added"
    if op.name == "aten.mul.Tensor" and len(op.inputs) == 2:
        makers = [graph.producers.get(v) for v in op.inputs]
        names = {m.name for m in makers if m is not None}
        if "aten.sigmoid.default" in names:
            return "added, gated by a sigmoid"
    return ""
