"""Ops with kernels of our own: which of them a kernel takes, and how it is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.bodies import vector_body
from moec.codegen.cpu import pack
from moec.codegen.cpu.attention import AttentionSpec, MaskSpec, attention
from moec.codegen.cpu.combine import combine
from moec.codegen.cpu.dispatch import dispatch
from moec.codegen.cpu.gate import GateSpec, gate
from moec.codegen.cpu.grouped import gathered_linear, grouped_linear
from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.linear import linear
from moec.codegen.cpu.norm import NormSpec, norm
from moec.codegen.cpu.route import RouteSpec, route
from moec.codegen.generic import scalars as sc
from moec.codegen.generic.groups import Group
from moec.codegen.generic.rules import named
from moec.codegen.lower import Lowering, Param, call_group
from moec.attention_op import Attention
from moec.ir import DType, Graph, Op, TensorType, Value
from moec.ops import GroupedLinear, Routing
from moec.sizes import Dim, product
from moec.target import Target

VECTOR_DTYPES = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Kernel:
    """`takes` says whether this op of this graph is one for it; `call` emits it."""

    call: Callable[[Lowering, Op], list[relax.Expr]]
    takes: Callable[[Op, Graph], bool]


KERNELS: dict[str, Kernel] = {}


def kernel(
    *names: str, takes: Callable[[Op, Graph], bool] = lambda op, graph: True
) -> Callable[[Callable[[Lowering, Op], list[relax.Expr]]], None]:
    def register(call: Callable[[Lowering, Op], list[relax.Expr]]) -> None:
        for name in names:
            KERNELS[name] = Kernel(call, takes)

    return register


def has_kernel(op: Op, graph: Graph) -> bool:
    found = KERNELS.get(op.name)
    return found is not None and found.takes(op, graph)


# ---- dense products --------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """y = x @ weight^T + bias: the weight [N, K] is a param, or one that was transposed."""

    x: Value
    weight: Value
    flipped: bool  # the param is [K, N]
    bias: Value | None


def dense_of(op: Op, graph: Graph) -> Dense | None:
    """The dense product that an op is, if its weight is known when compiling."""
    given = named(op)
    if op.name == "aten.linear.default":
        x, weight, bias, straight = given["input"], given["weight"], given["bias"], True
    elif op.name == "aten.addmm.default":
        if given["alpha"] != 1 or given["beta"] != 1:
            return None
        x, weight, bias, straight = given["mat1"], given["mat2"], given["self"], False
    else:
        x, weight, bias, straight = given["self"], given.get("mat2", given.get("other")), None, False
    turned = not straight
    source = graph.producers.get(weight)
    while source is not None and source.name in _TURNS and len(weight.shape) == 2:
        axes = source.attrs.get("dims")
        if axes in ((0, 1), (0, -1)):
            return None
        weight, turned = source.inputs[0], not turned
        source = graph.producers.get(weight)
    params = set(graph.params)
    fits = (
        weight in params
        and len(weight.shape) == 2
        and len(x.shape) >= 1
        and x.dtype == weight.dtype
        and x.dtype in VECTOR_DTYPES
        and (bias is None or (bias in params and bias.shape == op.outputs[0].shape[-1:]))
    )
    return Dense(x, weight, turned, bias) if fits else None


_TURNS = ("aten.t.default", "aten.transpose.int", "aten.permute.default")


@kernel(
    "aten.linear.default",
    "aten.mm.default",
    "aten.addmm.default",
    "aten.matmul.default",
    takes=lambda op, graph: dense_of(op, graph) is not None,
)
def _linear(low: Lowering, op: Op) -> list[relax.Expr]:
    dense = cast(Dense, dense_of(op, low.graph))
    out = op.outputs[0]
    n, k = out.shape[-1], dense.x.shape[-1]
    assert isinstance(n, int) and isinstance(k, int)
    spec = LinearSpec(
        n,
        k,
        sc.STORED[dense.x.dtype],
        sc.STORED[out.dtype],
        bias=dense.bias is not None,
    )
    layout = Layout(spec, low.target)
    rows = product(dense.x.shape[:-1])
    x = _as(low, dense.x, TensorType(dense.x.dtype, (rows, k)))
    weights = [low.param(*_packed(layout, (dense.weight,), dense.flipped))]
    if dense.bias is not None:
        weights.append(low.param(*_packed_bias(layout, (dense.bias,))))
    function = low.function(spec, "linear", lambda name: linear(low.target, spec, name=name))
    low.note(op, "linear")
    made = low.call(function, [x, *weights], [TensorType(out.dtype, (rows, n))])
    return [made[0] if out.shape == (rows, n) else low.reshaped(made[0], out.type)]


def _as(low: Lowering, value: Value, type: TensorType) -> relax.Expr:
    found = low.value(value)
    return found if value.type == type else low.reshaped(found, type)


def _packed(
    layout: Layout, weights: tuple[Value, ...], flipped: bool = False
) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        parts = [t.mT if flipped else t for t in tensors]
        return pack.pack(layout, *parts)

    dtype = "i32" if layout.pairs else weights[0].dtype
    name = "+".join(w.name for w in weights) + ".packed"
    return (layout, weights, flipped), Param(name, TensorType(dtype, layout.shape), weights, make)


def _packed_bias(layout: Layout, biases: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack.pack_bias(layout, *tensors)

    name = "+".join(b.name for b in biases) + ".packed"
    return (layout, biases, "bias"), Param(name, TensorType("f32", layout.bias_shape), biases, make)


# ---- norms and attention ---------------------------------------------------------------


@kernel("nn.rms_norm", takes=lambda op, graph: norm_fits(op.inputs[0], *op.inputs[1:]))
def _rms_norm(low: Lowering, op: Op) -> list[relax.Expr]:
    x, *weights = op.inputs
    spec = NormSpec(
        "rms",
        cast(int, x.shape[-1]),
        cast(float, op.attrs["epsilon"]),
        x.dtype,
        op.outputs[0].dtype,
        weights[0].dtype if weights else None,
        round_first=bool(op.attrs.get("round_first")),
    )
    return _normed(low, op, spec, x, weights)


@kernel(
    "aten.layer_norm.default",
    takes=lambda op, graph: len(cast(tuple[Dim, ...], named(op)["normalized_shape"])) == 1
    and norm_fits(*(v for v in op.inputs if v is not None)),
)
def _layer_norm(low: Lowering, op: Op) -> list[relax.Expr]:
    given = named(op)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    spec = NormSpec(
        "layer",
        x.shape[-1],
        float(given["eps"]),
        x.dtype,
        op.outputs[0].dtype,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
    )
    return _normed(low, op, spec, x, [v for v in (weight, bias) if v is not None])


def norm_fits(x: Value, *others: Value) -> bool:
    return isinstance(x.shape[-1], int) and all(v.dtype in VECTOR_DTYPES for v in (x, *others))


def _normed(
    low: Lowering, op: Op, spec: NormSpec, x: Value, weights: list[Value]
) -> list[relax.Expr]:
    out = op.outputs[0]
    rows = TensorType(x.dtype, (product(x.shape[:-1]), spec.width))
    name = f"{spec.kind}_norm"
    function = low.function(spec, name, lambda name: norm(spec, low.target, name))
    low.note(op, name)
    arguments = [_as(low, x, rows), *(low.value(v) for v in weights)]
    made = low.call(function, arguments, [TensorType(out.dtype, rows.shape)])
    return [made[0] if out.shape == rows.shape else low.reshaped(made[0], out.type)]


def _attention_inputs(op: Op) -> Attention | None:
    """An attention of either spelling; None where the kernel cannot do it."""
    if op.name == "nn.attention":
        found = Attention.of(op)
    else:
        given = named(op)
        q, k, v, mask = given["query"], given["key"], given["value"], given["attn_mask"]
        if len(q.shape) != 4 or given["dropout_p"]:
            return None
        if q.shape[1] != k.shape[1] and not given["enable_gqa"]:
            return None
        width = q.shape[3]
        scale = given["scale"] if given["scale"] is not None else width**-0.5
        found = Attention(q, k, v, mask, None, float(scale), given["is_causal"], None, None)
    q, k, v = found.q, found.k, found.v
    fixed = (q.shape[1], q.shape[3], k.shape[1], k.shape[3], v.shape[1], v.shape[3])
    if not all(isinstance(d, int) for d in fixed) or q.dtype not in VECTOR_DTYPES:
        return None
    if found.mask is not None and found.mask.dtype not in ("bool", *VECTOR_DTYPES):
        return None
    same = q.dtype == k.dtype == v.dtype and q.shape[0] == k.shape[0] == v.shape[0]
    return found if same and k.shape[1:3] == v.shape[1:3] else None


@kernel(
    "nn.attention",
    "aten.scaled_dot_product_attention.default",
    takes=lambda op, graph: _attention_inputs(op) is not None,
)
def _attention(low: Lowering, op: Op) -> list[relax.Expr]:
    a = cast(Attention, _attention_inputs(op))
    batch, heads, queries, width = a.q.shape
    keys = a.k.shape[2]
    mask, causal = a.mask, a.causal
    if a.window is not None or a.chunk is not None:
        mask, causal = visible_mask(low, op, a), False
    shape = () if mask is None else (*(1,) * (4 - len(mask.shape)), *mask.shape)
    spec = AttentionSpec(
        a.q.dtype,
        cast(int, heads),
        cast(int, a.k.shape[1]),
        cast(int, width),
        cast(int, a.v.shape[3]),
        a.scale,
        causal,
        None if mask is None else MaskSpec(mask.dtype, cast(Any, tuple(d != 1 for d in shape))),
        a.sinks is not None,
    )
    function = low.function(spec, "attention", lambda name: attention(spec, low.target, name))
    arguments = [low.value(v) for v in (a.q, a.k, a.v)]
    if mask is not None:
        arguments.append(_as(low, mask, TensorType(mask.dtype, shape)))
    if a.sinks is not None:
        arguments.append(low.value(a.sinks))
    low.note(op, "attention")
    assert batch == a.k.shape[0] and keys == a.v.shape[2]
    return low.call(function, arguments, [op.outputs[0].type])


def visible_mask(low: Lowering, op: Op, a: Attention) -> Value:
    """What window, chunk and causality let a query see, joined with the mask that is given."""
    queries, keys = a.q.shape[2], a.k.shape[2]
    key = (queries, keys, a.causal, a.window, a.chunk, a.mask)
    if key in low.masks:
        return low.masks[key]
    square: tuple[Dim, ...] = (queries, keys)
    ops: list[Op] = []

    def emit(name: str, inputs: Sequence[Value], type: TensorType, **attrs: Any) -> Value:
        value = Value(f"{op.outputs[0].name}_visible{len(ops)}", type)
        ops.append(Op(f"aten.{name}", tuple(inputs), (value,), attrs))
        return value

    def count(size: Dim, shape: tuple[Dim, ...]) -> Value:
        line = emit("arange.default", (), TensorType("i64", (size,)), end=size)
        return emit("view.default", (line,), TensorType("i64", shape), size=shape)

    query, place = count(queries, (queries, 1)), count(keys, (1, keys))
    limits = []
    if a.causal:
        limits.append(emit("le.Tensor", (place, query), TensorType("bool", square)))
    if a.window is not None:
        edge = emit("sub.Scalar", (query,), query.type, other=a.window)
        limits.append(emit("gt.Tensor", (place, edge), TensorType("bool", square)))
    if a.chunk is not None:
        parts = [emit("floor_divide.Scalar", (v,), v.type, other=a.chunk) for v in (place, query)]
        limits.append(emit("eq.Tensor", parts, TensorType("bool", square)))
    seen = limits[0]
    for limit in limits[1:]:
        seen = emit("logical_and.default", (seen, limit), seen.type)
    inputs: tuple[Value, ...] = ()
    if a.mask is not None:
        shape = broadcast(a.mask.shape, square)
        type = TensorType(a.mask.dtype, shape)
        inputs = (a.mask,)
        if a.mask.dtype == "bool":
            seen = emit("logical_and.default", (a.mask, seen), type)
        else:
            seen = emit("where.ScalarOther", (seen, a.mask), type, other=-math.inf)
    low.values[seen] = call_group(low, Group(ops[-1], ops, inputs))[0]
    low.masks[key] = seen
    return seen


def broadcast(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[Dim, ...]:
    rank = max(len(a), len(b))
    pairs = zip((*(1,) * (rank - len(a)), *a), (*(1,) * (rank - len(b)), *b), strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


# ---- routing ---------------------------------------------------------------------------


@kernel("moe.route")
def _route(low: Lowering, op: Op) -> list[relax.Expr]:
    logits, *correction = op.inputs
    count = logits.shape[1]
    assert isinstance(count, int)
    spec = RouteSpec(
        Routing.of(op), count, logits.dtype, correction[0].dtype if correction else None
    )
    function = low.function(spec, "route", lambda name: route(spec, low.target, name))
    low.note(op, "route")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


@kernel("moe.gate")
def _gate(low: Lowering, op: Op) -> list[relax.Expr]:
    x, weight, *rest = op.inputs
    bias = rest.pop(0).dtype if op.attrs.get("biased") else None
    correction = rest.pop(0).dtype if op.attrs.get("corrected") else None
    count, width = weight.shape
    assert isinstance(count, int) and isinstance(width, int)
    logits = cast(DType, op.attrs["logits"]).name
    routing = RouteSpec(Routing.of(op), count, logits, correction)
    spec = GateSpec(routing, width, x.dtype, weight.dtype, bias)
    function = low.function(spec, "gate", lambda name: gate(spec, low.target, name))
    low.note(op, "gate")
    return low.call(function, [low.value(v) for v in op.inputs], [v.type for v in op.outputs])


# ---- dispatch, experts, combine --------------------------------------------------------


@kernel("moe.sort")
def _sort(low: Lowering, op: Op) -> list[relax.Expr]:
    return _sorted(low, op, op.inputs[0])


def _sorted(low: Lowering, op: Op, experts: Value) -> list[relax.Expr]:
    """order, slots, ends of the choices; the same for all that ask about these experts."""
    count, k = op.attrs["num_experts"], experts.shape[1]
    key = (experts, count)
    if key not in low.sorted:
        assert isinstance(count, int) and isinstance(k, int)
        function = low.function(
            ("dispatch", count, k), "dispatch", lambda name: dispatch(count, k, name)
        )
        tokens = experts.shape[0]
        types = [
            TensorType("i32", (k * tokens,)),
            TensorType("i32", (tokens, k)),
            TensorType("i32", (count,)),
        ]
        low.sorted[key] = low.call(function, [low.value(experts)], types)
        low.note(op, "dispatch")
    return low.sorted[key]


def linears_fit(op: Op, graph: Graph) -> bool:
    """Whether the stacks are params of one dtype and the body is one that vectors can do."""
    parts = GroupedLinear.of(op)
    params = set(graph.params)
    return (
        1 <= len(parts.matrices) <= 2
        and all(m in params and m.dtype == parts.x.dtype for m in parts.matrices)
        and all(b in params for b in parts.biases)
        and len({m.shape for m in parts.matrices}) == 1
        and parts.x.dtype in VECTOR_DTYPES
        and (op.body is None or vector_body(op.body) is not None)
    )


@kernel("grouped.linear", takes=linears_fit)
def _grouped(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedLinear.of(op)
    out = op.outputs[0]
    count, n, k = parts.matrices[0].shape
    assert isinstance(n, int) and isinstance(k, int) and isinstance(count, int)
    spec = LinearSpec(
        n,
        k,
        sc.STORED[parts.x.dtype],
        sc.STORED[out.dtype],
        groups=count,
        gated=len(parts.matrices) == 2,
        bias=bool(parts.biases),
    )
    layout = Layout(spec, low.target)
    top_k = cast(int, op.attrs.get("gather", 0))
    scale = sc.STORED[parts.scale.dtype] if parts.scale is not None else None
    body = None if op.body is None else vector_body(op.body)
    key = (spec, top_k, scale, None if body is None else body.text)

    def make(name: str) -> PrimFunc:
        after = None if body is None else body.epilogue(low.target)
        if top_k:
            return gathered_linear(low.target, spec, top_k, after, scale, name)
        return grouped_linear(low.target, spec, after, name)

    name = "gathered" if top_k else "grouped"
    function = low.function(key, name if body is None else f"{name}_{body.name}", make)
    arguments = [low.value(parts.x)]
    if top_k and parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments.append(low.value(parts.ends))
    arguments.append(low.param(*_packed(layout, parts.matrices)))
    if parts.biases:
        arguments.append(low.param(*_packed_bias(layout, parts.biases)))
    if parts.scale is not None:
        arguments.append(low.value(parts.scale))
    low.note(op, name if body is None else f"{name} with {body.name}")
    return low.call(function, arguments, [out.type])


def _sorting(places: Value, graph: Graph) -> Op | None:
    """The op that ordered the choices by expert, through a reshape of its places."""
    source = graph.producers.get(places)
    if source is not None and source.name == "aten.reshape.default":
        source = graph.producers.get(source.inputs[0])
    if source is None or source.name not in ("moe.sort", "moe.dispatch"):
        return None
    return source


@kernel(
    "moe.combine",
    takes=lambda op, graph: _sorting(op.inputs[1], graph) is not None,
)
def _combine(low: Lowering, op: Op) -> list[relax.Expr]:
    rows, places, *rest = op.inputs
    out = op.outputs[0]
    source = cast(Op, _sorting(places, low.graph))
    experts = source.inputs[1 if source.name == "moe.dispatch" else 0]
    _, slots, ends = _sorted(low, source, experts)
    weights = rest.pop(0) if op.attrs.get("weighted") else None
    addend = rest.pop(0) if op.attrs.get("added") else None
    count, k, width = cast(int, source.attrs["num_experts"]), cast(int, op.attrs["k"]), out.shape[1]
    assert isinstance(width, int)
    if len(places.shape) == 2:
        slots = low.value(places)
    kinds = [None if v is None else sc.STORED[v.dtype] for v in (weights, addend)]
    key = ("combine", count, k, width, out.dtype, rows.dtype, *kinds)
    function = low.function(
        key,
        "combine",
        lambda name: combine(
            low.target,
            count,
            k,
            width,
            sc.STORED[out.dtype],
            sc.STORED[rows.dtype],
            kinds[0],
            kinds[1],
            name,
        ),
    )
    more = [low.value(v) for v in (weights, addend) if v is not None]
    low.note(op, "combine")
    return low.call(function, [low.value(rows), slots, ends, *more], [out.type])


@kernel("moe.dispatch")
def _dispatch(low: Lowering, op: Op) -> list[relax.Expr]:
    """The sort, then rows gathered (and scaled) by generic ops."""
    x, experts, *weights = op.inputs
    rows, order, ends = op.outputs
    sorted_ = _sorted(low, op, experts)
    low.values[order] = sorted_[0]
    k = experts.shape[1]
    many = rows.shape[0]
    token = Value(f"{rows.name}_token", TensorType("i32", (many,)))
    ops = [Op("aten.floor_divide.default", (order,), (token,), {"other": k})]
    picked = rows if not weights else Value(f"{rows.name}_picked", rows.type)
    ops.append(Op("aten.index_select.default", (x, token), (picked,), {"dim": 0}))
    inputs = [order, x]
    if weights:
        flat = Value(f"{rows.name}_weights", TensorType(weights[0].dtype, (many,)))
        low.values[flat] = low.reshaped(low.value(weights[0]), flat.type)
        scale = Value(f"{rows.name}_scale", flat.type)
        wide = Value(f"{rows.name}_wide", TensorType(flat.dtype, (many, 1)))
        same = Value(f"{rows.name}_same", TensorType(rows.dtype, (many, 1)))
        ops += [
            Op("aten.index_select.default", (flat, order), (scale,), {"dim": 0}),
            Op("aten.unsqueeze.default", (scale,), (wide,), {"dim": 1}),
            Op("aten._to_copy.default", (wide,), (same,), {"dtype": DType(rows.dtype)}),
            Op("aten.mul.Tensor", (picked, same), (rows,)),
        ]
        inputs.append(flat)
    made = call_group(low, Group(ops[-1], ops, tuple(inputs)))
    return [made[0], sorted_[0], sorted_[2]]


@kernel("moec.size")
def _size(low: Lowering, op: Op) -> list[relax.Expr]:
    """From here on the size has the value that was computed."""
    name = cast(str, op.attrs["name"])
    source = op.inputs[0]
    found = low.value(source)
    if source.dtype != "i64":
        wide = Value(f"{source.name}_wide", TensorType("i64", source.shape))
        cast_ = Op("aten._to_copy.default", (source,), (wide,), {"dtype": DType("i64")})
        found = call_group(low, Group(cast_, [cast_], (source,)))[0]
    one: tuple[Dim, ...] = (1,)
    if source.shape != one:
        found = low.reshaped(found, TensorType("i64", one))
    shape = low.builder.emit(relax.op.tensor_to_shape(found))
    low.builder.match_cast(shape, relax.ShapeType([low.sizes.variables[name]]))
    return [low.value(source)]
