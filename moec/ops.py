"""The operators of moec: what each takes and gives, and what it means in eager PyTorch.

T tokens, E experts, k choices a token, D model width, H hidden width, R = k*T routed rows.
Rows are the T*k choices sorted by expert (stable): row r is choice order[r] = t*k + s of
token t, and expert e owns rows ends[e-1]..ends[e]. An id of E stands for "no expert": its
rows come after ends[E-1], hold zeros, and add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from moec.errors import IRError
from moec.ir import Graph, Op, TensorType, Value
from moec.sizes import Dim

Runner = Callable[[Graph, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
Reference = Callable[[Op, Sequence[torch.Tensor], Mapping[str, Any], Runner], Any]


@dataclass(frozen=True)
class OpDef:
    """A whole op: its type rule, and its meaning as eager PyTorch.

    `infer(op)` gives the types of the outputs from inputs, attrs and body, and raises IRError
    where they break the op's rules. `reference(op, tensors, attrs, run)` computes them; `attrs`
    has its sizes bound, `run(body, tensors)` evaluates a body.
    """

    infer: Callable[[Op], tuple[TensorType, ...]]
    reference: Reference


OPS: dict[str, OpDef] = {}


def defop(name: str, infer: Callable[[Op], tuple[TensorType, ...]]) -> Callable[..., Reference]:
    def register(reference: Reference) -> Reference:
        OPS[name] = OpDef(infer, reference)
        return reference

    return register


def require(op: Op, rule: bool, message: str) -> None:
    if not rule:
        raise IRError(f"{op}: {message}")


def integer(op: Op, name: str) -> int:
    value = op.attrs.get(name)
    require(op, isinstance(value, int) and not isinstance(value, bool), f"{name} is not an int")
    return cast(int, value)


# ---- sizes that are read from data -----------------------------------------------------


def _infer_size(op: Op) -> tuple[TensorType, ...]:
    require(op, op.inputs[0].shape in ((), (1,)), f"{op.inputs[0]} is not one number")
    return (op.inputs[0].type,)


@defop("moec.size", _infer_size)
def size(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """One integer -> itself; from here on the size `name` has that value."""
    return tensors[0]


# ---- routing ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """How a router turns logits into choices.

    scores = score(logits); the k best of scores + correction are chosen, within the best
    `top_groups` of `groups` groups where these are set; weights = after(scores of the chosen),
    divided by their sum + epsilon where `renormalize`, times `scale`. Ties: the lower id wins.
    `score="sparsemixer"` is PhiMoE's sampler at inference (arXiv 2310.00811) with `jitter`.
    """

    k: int
    score: str = "softmax"  # softmax, sigmoid, none, sparsemixer
    after: str = "none"  # none, softmax, sigmoid
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"  # max, top2sum
    jitter: float = 0.0
    dtype: str = "f32"  # of the weights

    @staticmethod
    def of(op: Op) -> Routing:
        known = {name: op.attrs[name] for name in Routing.__dataclass_fields__ if name in op.attrs}
        return Routing(**known)  # type: ignore[arg-type]

    def attrs(self) -> dict[str, Any]:
        """As attributes of an op: k, and the fields that differ from their defaults."""
        fields = Routing.__dataclass_fields__
        return {
            name: getattr(self, name)
            for name in fields
            if name == "k" or getattr(self, name) != fields[name].default
        }


def _route_types(op: Op, tokens: Dim, experts: Dim) -> tuple[TensorType, ...]:
    routing = Routing.of(op)
    require(op, routing.score in ("softmax", "sigmoid", "none", "sparsemixer"), "unknown score")
    require(op, routing.after in ("none", "softmax", "sigmoid"), "unknown after")
    require(op, routing.group_score in ("max", "top2sum"), "unknown group_score")
    if isinstance(experts, int):
        require(op, 1 <= routing.k <= experts, f"k={routing.k} of {experts} experts")
        require(op, experts % routing.groups == 0, f"{routing.groups} groups of {experts} experts")
    return (
        TensorType(routing.dtype, (tokens, routing.k)),
        TensorType("i64", (tokens, routing.k)),
    )


def _infer_route(op: Op) -> tuple[TensorType, ...]:
    logits = op.inputs[0]
    require(op, len(logits.shape) == 2, f"logits are {logits.type}, expected [T, E]")
    for correction in op.inputs[1:]:
        require(op, correction.shape == logits.shape[1:], "the correction is not [E]")
    return _route_types(op, *logits.shape)


@defop("moe.route", _infer_route)
def route(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """logits[T, E], correction[E]? -> weights[T, k], experts[T, k]; attributes: `Routing`."""
    return route_logits(Routing.of(op), tensors[0], tensors[1] if len(tensors) > 1 else None)


def _infer_gate(op: Op) -> tuple[TensorType, ...]:
    x, weight = op.inputs[:2]
    require(op, len(x.shape) == 2 and x.shape[1:] == weight.shape[1:], f"{x} by {weight}")
    return _route_types(op, x.shape[0], weight.shape[0])


@defop("moe.gate", _infer_gate)
def gate(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[T, D], weight[E, D], bias[E]?, correction[E]? -> weights[T, k], experts[T, k].

    Attributes: those of `Routing`, `biased` (a bias is there), `corrected` (a correction is
    there), `logits` (the dtype to which the linear layer's result is rounded), `compute` (the
    dtype in which it runs).
    """
    rest = list(tensors[2:])
    bias = rest.pop(0) if attrs.get("biased") else None
    correction = rest.pop(0) if attrs.get("corrected") else None
    compute = attrs["compute"]
    logits = torch.nn.functional.linear(
        tensors[0].to(compute),
        tensors[1].to(compute),
        None if bias is None else bias.to(compute),
    )
    return route_logits(Routing.of(op), logits.to(attrs["logits"]), correction)


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The ids of the k greatest, in falling order, lower id first among equals; NaN is greatest."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def route_logits(
    routing: Routing, logits: torch.Tensor, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from moec.aten import TORCH_DTYPES

    dtype = TORCH_DTYPES[routing.dtype]
    logits = logits.float()
    if routing.score == "sparsemixer":
        weights, experts = _sparsemixer(logits, routing)
        return weights.to(dtype), experts
    scores = {
        "softmax": lambda: logits.softmax(-1),
        "sigmoid": lambda: logits.sigmoid(),
        "none": lambda: logits,
    }[routing.score]()
    choice = scores if correction is None else scores + correction.float()
    if routing.groups > 1:
        size = choice.shape[-1] // routing.groups
        grouped = choice.reshape(*choice.shape[:-1], routing.groups, size)
        ranked = grouped.sort(-1, descending=True).values
        group_scores = ranked[..., 0] if routing.group_score == "max" else ranked[..., :2].sum(-1)
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(-1, top_k(group_scores, routing.top_groups), True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = top_k(choice, routing.k)
    weights = scores.gather(-1, experts)
    if routing.after == "softmax":
        weights = weights.softmax(-1)
    elif routing.after == "sigmoid":
        weights = weights.sigmoid()
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + routing.epsilon)
    return (weights * routing.scale).to(dtype), experts


def _sparsemixer(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Each choice: softmax over the logits within `2*jitter` (relative) of the greatest left."""
    left = logits
    weights, experts = [], []
    for _ in range(routing.k):
        greatest = left.max(-1, keepdim=True).values
        chosen = top_k(left, 1)
        factor = logits.abs().clamp(min=greatest)
        far = (greatest - logits) / factor > 2 * routing.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        experts.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


def _infer_capacity(op: Op) -> tuple[TensorType, ...]:
    require(op, len(op.inputs[0].shape) == 2, "experts are not [T, k]")
    return (op.inputs[0].type,)


@defop("moe.capacity", _infer_capacity)
def capacity(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """experts[T, k] -> the same with choices beyond `capacity` per expert set to E.

    Attributes: `num_experts`, `capacity` (a size), `order`: "token" counts choices token by
    token (slots within a token in order), "slot" counts all first choices before any second
    one (GShard, arXiv 2006.16668, algorithm 1).
    """
    (experts,), count = tensors, attrs["num_experts"]
    by_slot = attrs.get("order", "slot") == "slot"
    flat = (experts.t() if by_slot else experts).reshape(-1)
    hot = torch.nn.functional.one_hot(flat, count + 1)
    place = (hot.cumsum(0) - hot).gather(1, flat[:, None])[:, 0]
    kept = torch.where(place < attrs["capacity"], flat, count)
    tokens, k = experts.shape
    return kept.reshape(k, tokens).t().contiguous() if by_slot else kept.reshape(tokens, k)


# ---- dispatch, experts, combine --------------------------------------------------------


def sort_choices(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    flat = experts.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    ends = torch.bincount(flat, minlength=count)[:count].cumsum(0)
    return order.int(), slots.reshape(experts.shape).int(), ends.int()


def _infer_sort(op: Op) -> tuple[TensorType, ...]:
    tokens, k = op.inputs[0].shape
    return (
        TensorType("i32", (k * tokens,)),
        TensorType("i32", (tokens, k)),
        TensorType("i32", (integer(op, "num_experts"),)),
    )


@defop("moe.sort", _infer_sort)
def sort(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """experts[T, k] -> order[R], slots[T, k] (the row of each choice), ends[E]."""
    return sort_choices(tensors[0], attrs["num_experts"])


def _infer_dispatch(op: Op) -> tuple[TensorType, ...]:
    x, experts = op.inputs[:2]
    require(op, len(x.shape) == 2 and len(experts.shape) == 2, f"{x} by {experts}")
    require(op, x.shape[0] == experts.shape[0], f"{x.shape[0]} tokens, {experts.shape[0]} choices")
    rows = experts.shape[1] * experts.shape[0]
    return (
        TensorType(x.dtype, (rows, x.shape[1])),
        TensorType("i32", (rows,)),
        TensorType("i32", (integer(op, "num_experts"),)),
    )


@defop("moe.dispatch", _infer_dispatch)
def dispatch(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[T, D], experts[T, k], weights[T, k]? -> rows[R, D], order[R], ends[E].

    With weights, each row is scaled by its own: the input side (Llama 4).
    """
    x, experts = tensors[:2]
    order, _, ends = sort_choices(experts, attrs["num_experts"])
    rows = x[order.long() // experts.shape[1]]
    if len(tensors) > 2:
        rows = rows * tensors[2].reshape(-1)[order.long()][:, None].to(rows.dtype)
    return rows, order, ends


def _infer_experts(op: Op) -> tuple[TensorType, ...]:
    rows, ends, *stacks = op.inputs
    body = op.body
    require(op, body is not None, "has no body")
    body = cast(Graph, body)
    require(op, len(body.inputs) == 1 and len(body.outputs) == 1, "a body maps rows to rows")
    require(op, len(body.params) == len(stacks), "a body takes one slice of each stack")
    for stack, param in zip(stacks, body.params, strict=True):
        require(op, stack.shape[:1] == ends.shape, f"{stack} is not stacked over {ends.shape}")
        require(op, stack.shape[1:] == param.shape, f"{stack} feeds {param}")
    require(op, body.inputs[0].shape[1:] == rows.shape[1:], f"{rows} feeds {body.inputs[0]}")
    result = body.outputs[0]
    return (TensorType(result.dtype, (rows.shape[0], *result.shape[1:])),)


@defop("moe.experts", _infer_experts)
def experts(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """rows[R, D], ends[E], stacked params -> rows: the body over each expert's rows."""
    rows, ends, *stacks = tensors
    assert op.body is not None
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(run(op.body, [rows[start:end], *(stack[expert] for stack in stacks)])[0])
        start = end
    rest = rows.shape[0] - start
    parts.append(parts[0].new_zeros(rest, *parts[0].shape[1:]))
    return torch.cat(parts)


def _infer_combine(op: Op) -> tuple[TensorType, ...]:
    rows, places = op.inputs[:2]
    k = integer(op, "k")
    tokens = cast(Dim, op.attrs["tokens"])
    require(op, places.shape in ((k * tokens,), (tokens, k)), f"{places} does not hold the choices")
    from moec.ir import DType

    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (tokens, rows.shape[1])),)


@defop("moe.combine", _infer_combine)
def combine(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """rows[R, D], order[R] or slots[T, k], weights[T, k]?, addend[T, D]? -> y[T, D].

    y[t] = sum over s of weights[t, s] * rows[slots[t, s]] (+ addend[t]), summed in float32 in
    the order of the slots. Attributes: `k`, `tokens` (T), `dtype` of y, `weighted`, `added`.
    """
    rows, places, *rest = tensors
    k = attrs["k"]
    order = places.long()
    if places.ndim == 1:
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    else:
        slots = order.reshape(-1)
    picked = rows.float()[slots].reshape(-1, k, rows.shape[1])
    if attrs.get("weighted"):
        picked = picked * rest.pop(0).float()[..., None]
    total = picked[:, 0]
    for s in range(1, k):
        total = total + picked[:, s]
    if attrs.get("added"):
        total = total + rest.pop(0).float()
    return total.to(attrs["dtype"])


# ---- grouped: bodies over all rows at once ---------------------------------------------


@dataclass(frozen=True)
class GroupedLinear:
    """The inputs of grouped.linear by name."""

    x: Value
    ends: Value
    matrices: tuple[Value, ...]
    biases: tuple[Value, ...]
    order: Value | None
    scale: Value | None

    @staticmethod
    def of(op: Op) -> GroupedLinear:
        x, ends, *rest = op.inputs
        count = integer(op, "matrices")
        matrices = tuple(rest[:count])
        rest = rest[count:]
        biases = tuple(rest[:count]) if op.attrs.get("biased") else ()
        rest = rest[len(biases) :]
        order = rest.pop(0) if op.attrs.get("gather") else None
        scale = rest.pop(0) if op.attrs.get("scaled") else None
        require(op, not rest, "has inputs that no attribute names")
        return GroupedLinear(x, ends, matrices, biases, order, scale)


def _infer_grouped_linear(op: Op) -> tuple[TensorType, ...]:
    parts = GroupedLinear.of(op)
    for matrix in parts.matrices:
        require(op, len(matrix.shape) == 3, f"{matrix} is not [E, N, K]")
        require(op, matrix.shape[2] == parts.x.shape[1], f"{parts.x} by {matrix}")
        require(op, matrix.shape[:1] == parts.ends.shape, f"{matrix} for {parts.ends}")
    for matrix, bias in zip(parts.matrices, parts.biases, strict=False):
        require(op, bias.shape == matrix.shape[:2], f"{bias} for {matrix}")
    rows = parts.order.shape[0] if parts.order is not None else parts.x.shape[0]
    from moec.ir import DType

    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (rows, parts.matrices[0].shape[1])),)


@defop("grouped.linear", _infer_grouped_linear)
def grouped_linear(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x, ends[E], matrices[E, N, K]…, biases[E, N]…, order[R]?, scale[T, k]? -> h[R, N].

    acc_j = row @ matrices_j[e].T (+ biases_j[e]), h = body(acc_0, …) or acc_0. Attributes:
    `matrices` (how many), `biased`, `gather` (k: x is [T, K] and row r reads x[order[r] // k];
    0: x is rows already), `scaled` (row r is first multiplied by scale[order[r]]), `dtype` of
    h. Rows that nobody owns are zero.
    """
    x, ends, *rest = tensors
    count, k = attrs["matrices"], attrs.get("gather", 0)
    matrices, rest = rest[:count], rest[count:]
    biases = [rest.pop(0) for _ in range(count)] if attrs.get("biased") else [None] * count
    if k:
        order = rest.pop(0).long()
        x = x[order // k]
        if attrs.get("scaled"):
            x = x * rest.pop(0).reshape(-1)[order][:, None].to(x.dtype)
    result = x.new_zeros(x.shape[0], matrices[0].shape[1], dtype=attrs["dtype"])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = x[start:end]
        parts = [
            torch.nn.functional.linear(rows, m[expert], None if b is None else b[expert])
            for m, b in zip(matrices, biases, strict=True)
        ]
        result[start:end] = (run(op.body, parts)[0] if op.body else parts[0]).to(attrs["dtype"])
        start = end
    return result


def _infer_expert_of(op: Op) -> tuple[TensorType, ...]:
    from moec.sizes import normal

    return (TensorType("i64", (normal(op.attrs["rows"]),)),)


@defop("grouped.expert_of", _infer_expert_of)
def expert_of(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """ends[E] -> the expert of each row, i64[R]; rows that nobody owns count as E - 1."""
    (ends,) = tensors
    rows = torch.arange(attrs["rows"])
    return torch.searchsorted(ends.long(), rows, right=True).clamp(max=len(ends) - 1)


# ---- the rest of the model -------------------------------------------------------------


def _infer_rms_norm(op: Op) -> tuple[TensorType, ...]:
    x, *weight = op.inputs
    require(op, len(x.shape) >= 1 and len(weight) <= 1, "takes x[.., D] and weight[D]?")
    require(op, not weight or weight[0].shape == x.shape[-1:], f"{weight} is not for {x}")
    return (x.type,)


@defop("nn.rms_norm", _infer_rms_norm)
def rms_norm(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[.., D], weight[D]? -> x / sqrt(mean(x^2) + epsilon) * weight, in float32, then cast.

    `round_first`: the normalised value is rounded to x's dtype before weight multiplies it.
    """
    x = tensors[0]
    full = x.float()
    full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + attrs["epsilon"])
    if attrs.get("round_first"):
        full = full.to(x.dtype)
    if len(tensors) > 1:
        full = full * (tensors[1] if attrs.get("round_first") else tensors[1].float())
    return full.to(x.dtype)


# The rest of the model's ops have files of their own, which register into OPS.
from moec import attention_op, rotary_op  # noqa: E402, F401
