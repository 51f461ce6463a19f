"""moe.gate, moe.route, moe.capacity: logits -> weights and experts [T, k]."""

from __future__ import annotations

from collections.abc import Sequence

from moec.codegen.onnx.aten.matrix import transposed
from moec.codegen.onnx.aten.ranking import reduced_extreme, top
from moec.codegen.onnx.rules import Call, build
from moec.codegen.onnx.sizes import reshaped
from moec.codegen.onnx.writer import NodeWriter
from moec.dtypes import HALVES
from moec.ir.graph import DType, Op, Value
from moec.ir.opdef import inputs_of
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import Dim

LOW = float("-inf")


def logits_of(w: NodeWriter, op: Op) -> tuple[str, Value | None, tuple[Dim, Dim]]:
    """The logits in the `router_dtype`; the correction that affects only the choice; [T, E]."""
    if op.name == "moe.route":
        value, correction = inputs_of(op).values()
        tokens, experts = value.shape
        logits = w.cast(w.read(value), value.dtype, router_dtype(op))
        return logits, correction, (tokens, experts)
    x, weight, bias, correction = inputs_of(op).values()
    compute, rounded = (_dtype(op, name) for name in ("compute", "logits"))
    turned = w.cast(transposed(w, weight), weight.dtype, compute)
    product = w("MatMul", w.cast(w.read(x), x.dtype, compute), turned)
    if bias is not None:
        product = w("Add", product, w.cast(w.read(bias), bias.dtype, compute))
    logits = w.cast(w.cast(product, compute, rounded), rounded, router_dtype(op))
    return logits, correction, (x.shape[0], weight.shape[0])


def router_dtype(op: Op) -> str:
    """The dtype in which a router computes: float64 for logits of float64, else float32."""
    logits = op.inputs[0].dtype if op.name == "moe.route" else _dtype(op, "logits")
    return "f64" if logits == "f64" else "f32"


def _dtype(op: Op, name: str) -> str:
    attr = op.attrs[name]
    assert isinstance(attr, DType)
    return attr.name


@build("moe.gate", "moe.route")
def route(c: Call) -> Sequence[str]:
    """Of equal scores, `top` prefers the lower id, as the IR does."""
    w, routing, full = c.w, Routing.of(c.op), router_dtype(c.op)
    logits, correction, shape = logits_of(w, c.op)
    if routing.score == "sparsemixer":
        return _sparsemixer(w, routing, logits, full)
    scores = {"softmax": lambda: w("Softmax", logits, axis=-1), "none": lambda: logits}.get(
        routing.score, lambda: w("Sigmoid", logits)
    )()
    scores = _rounded(w, scores, full, routing.score_dtype)
    choice = scores
    if correction is not None:
        choice = w("Add", choice, w.cast(w.read(correction), correction.dtype, full))
    choice = _rounded(w, choice, full, routing.choice_dtype)
    if routing.groups > 1:
        choice = _best_groups(w, routing, choice, shape, full)
    weights, experts = top(w, choice, full, w.constant([routing.k]))
    if choice != scores:
        weights = w("GatherElements", scores, experts, axis=-1)
    if routing.after == "softmax":
        weights = w("Softmax", weights, axis=-1)
    elif routing.after == "sigmoid":
        weights = w("Sigmoid", weights)
    if routing.renormalize:
        total = w("ReduceSum", weights, w.constant([-1]), keepdims=1)
        if routing.epsilon:
            total = w("Add", total, w.constant(routing.epsilon, full))
        weights = w("Div", weights, total)
    if routing.scale != 1.0:
        weights = w("Mul", weights, w.constant(routing.scale, full))
    return w.cast(weights, full, routing.dtype), experts


def _rounded(w: NodeWriter, floats: str, full: str, dtype: str) -> str:
    return w.cast(w.cast(floats, full, dtype), dtype, full) if dtype in HALVES else floats


def _best_groups(
    w: NodeWriter, routing: Routing, choice: str, shape: tuple[Dim, Dim], full: str
) -> str:
    """The scores for the choice, with minus infinity outside of each token's best groups."""
    tokens, experts = shape
    assert isinstance(experts, int)
    grouped_shape = (tokens, routing.groups, experts // routing.groups)
    grouped = reshaped(w, choice, shape, grouped_shape)
    last = w.constant([-1])
    if routing.group_score == "max":
        scores = reduced_extreme(w, "ReduceMax", grouped, full, last, keep=0)
    else:
        two = w.constant([min(2, experts // routing.groups)])
        scores = w("ReduceSum", top(w, grouped, full, two)[0], last, keepdims=0)
        scores = _rounded(w, scores, full, routing.choice_dtype)
    best = top(w, scores, full, w.constant([routing.top_groups]))[1]
    size = w("Shape", best)
    ones = w("Expand", w.constant(1, "f32"), size)
    none = w("Expand", w.constant(0, "f32"), w("Shape", scores))
    marks = w("ScatterElements", none, best, ones, axis=-1)
    mask = w("Unsqueeze", w.cast(marks, "f32", "bool"), last)
    remaining = w("Where", mask, grouped, w.constant(LOW, full))
    return reshaped(w, remaining, grouped_shape, shape)


def _sparsemixer(w: NodeWriter, routing: Routing, logits: str, full: str) -> Sequence[str]:
    """See `moec.ir.ops.routing.routing`: choices are made one after the other, each among the
    remaining experts."""
    left, weights, experts = logits, [], []
    one = w.constant([1])
    size, low = w.constant(2 * routing.jitter, full), w.constant(LOW, full)
    for turn in range(routing.k):
        greatest, chosen = top(w, left, full, one)
        factor = w("Max", w("Abs", logits), greatest)
        far = w("Greater", w("Div", w("Sub", greatest, logits), factor), size)
        shares = w("Softmax", w("Where", far, low, left), axis=-1)
        weights.append(w("GatherElements", shares, chosen, axis=-1))
        experts.append(chosen)
        if turn + 1 < routing.k:
            lowest = w("Expand", low, w("Shape", chosen))
            left = w("ScatterElements", left, chosen, lowest, axis=-1)
    joined = w("Concat", *weights, axis=-1)
    return w.cast(joined, full, routing.dtype), w("Concat", *experts, axis=-1)


@build("moe.capacity")
def capacity(c: Call) -> str:
    """The position of a choice among those of its expert is a cumulative count."""
    w, ids = c.w, c.op.inputs[0]
    count = c.op.attrs["num_experts"]
    assert isinstance(count, int)
    by_slot = c.op.attrs.get("order", "slot") == "slot"
    tokens, k = ids.shape
    experts = c.read(ids)
    flat_shape = (tokens, k)
    if by_slot:
        experts, flat_shape = w("Transpose", experts, perm=[1, 0]), (k, tokens)
    flat = w("Reshape", experts, w.constant([-1]))
    column = w("Unsqueeze", flat, w.constant([1]))
    every = w.constant(list(range(count + 1)))
    hot = w.cast(w("Equal", column, every), "bool", "i64")
    before = w("CumSum", hot, w.constant(0), exclusive=1)
    position = w("ReduceSum", w("Mul", before, hot), w.constant([1]), keepdims=0)
    fits = w("Less", position, w.dim(c.op.attrs["capacity"]))
    choices = w("Where", fits, flat, w.constant(count))
    shaped = reshaped(w, choices, (tokens * k,), flat_shape)
    return w("Transpose", shaped, perm=[1, 0]) if by_slot else shaped
