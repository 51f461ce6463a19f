"""com.microsoft.MoE: one node for a whole block, if ONNX Runtime's CPU kernel supports it.

    weights, experts = moe.gate(x, …)
    order, slots, ends = moe.sort(experts)                 y = MoE(x, logits, fc1, b1, fc2, b2)
    h = grouped.linear(x, ends, gate, up, order) {…}  ->
    d = grouped.linear(h, ends, down)
    y = moe.combine(d, slots, weights)

The kernel takes gate and up interleaved (swiglu_fusion=1), ranks softmax(router_probs) itself, and
divides by the sum of the chosen weights (normalize_routing_weights=1). Any other router is
converted to that form: router_probs = log(weights) for the chosen experts and minus infinity for
the others, and the result is multiplied by the sum of the weights. Two attributes are never
written: normalize_routing_weights=0, with which the CPU kernel of ONNX Runtime 1.31 gives wrong
numbers between two other nodes (microsoft/onnxruntime#33866), and use_sparse_mixer, which the
kernel ignores. A feature without an attribute is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moec.codegen.onnx.moe.experts import columns
from moec.codegen.onnx.moe.routing import logits_of, router_dtype
from moec.codegen.onnx.profiles import MICROSOFT
from moec.codegen.onnx.writer import NodeWriter, Weight
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.interpret.evaluate import run_graph
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.ir.ops.experts.quantised import GroupedQuantised
from moec.ir.ops.routing.routing import Routing
from moec.ir.upcast import widen

SMALLEST = 1e-30  # replaces a weight of zero, which has no logarithm


@dataclass(frozen=True)
class Activation:
    """`kind` is the attribute activation_type; alpha, beta and limit are those of swiglu: g *
    sigmoid(alpha g) * (u + beta), with g at most limit and u between -limit and limit."""

    kind: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.kind != "swiglu":
            return _FUNCTIONS[self.kind](gate)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Fused:
    """A block that one MoE node computes. `swapped`: the second matrix is the gate. `normal`: the
    router is softmax, top-k, and division by the sum."""

    router: Op
    x: Value
    up: GroupedLinear | GroupedQuantised
    down: GroupedLinear | GroupedQuantised
    activation: Activation
    swapped: bool
    normal: bool
    k: int
    addend: Value | None

    @property
    def quantised(self) -> bool:
        return isinstance(self.up, GroupedQuantised)

    @property
    def experts(self) -> int:
        return int(str(self.up.ends.shape[0]))


Grouped = GroupedLinear | GroupedQuantised
_KINDS: dict[str, Callable[[Op], Grouped]] = {
    "grouped.linear": GroupedLinear.of,
    "grouped.quantised": GroupedQuantised.of,
}


def is_quantised(graph: Graph, combine: Op) -> bool:
    """Whether the experts of the block that ends in `combine` have weights of few bits."""
    last = graph.producers.get(combine.inputs[0])
    return last is not None and last.name == "grouped.quantised"


def match(graph: Graph, combine: Op) -> Fused:
    """The block that ends in `combine`.

    Raises NoMatch that names the attribute or input that the operator lacks.
    """
    last = graph.producers.get(combine.inputs[0])
    if last is None or last.name not in _KINDS:
        raise NoMatch("the output of the experts is not that of a linear layer")
    first = graph.producers.get(last.inputs[0])
    if first is None or first.name != last.name:
        raise NoMatch("the experts are not two linear layers with an activation_type between them")
    up, down = _KINDS[first.name](first), _KINDS[last.name](last)
    router, normal = _router(graph, combine, up)
    if not normal and up.x.dtype == "bf16":
        raise NoMatch("router_probs would round the logarithms of the weights to bf16")
    if up.scale is not None:
        raise NoMatch(
            "the routing weights scale the experts' input, which the operator does not support"
        )
    if up.order is None:
        raise NoMatch("the rows are not gathered by the first linear layer (fuse-dispatch is off)")
    if down.order is not None or len(down.matrices) != 1 or last.body is not None:
        raise NoMatch("an op follows the second linear layer, which the operator does not support")
    if up.x is not router.inputs[0] and router.name == "moe.gate":
        raise NoMatch("the router reads another input than the experts, and the operator has one")
    activation, swapped = _activation(first, up)
    added = combine.inputs[-1] if combine.attrs.get("added") else None
    routing = Routing.of(router)
    return Fused(router, up.x, up, down, activation, swapped, normal, routing.k, added)


def _router(graph: Graph, combine: Op, up: Grouped) -> tuple[Op, bool]:
    """The router, and whether it is the kernel's own."""
    if not combine.attrs.get("weighted"):
        raise NoMatch(
            "the routing weights scale the experts' input, which the operator does not support"
        )
    router = graph.producers.get(combine.inputs[2])
    sort = graph.producers[up.ends]
    if router is None or router.name not in ("moe.gate", "moe.route"):
        raise NoMatch(
            "the router is not a score function and a top-k, so its weights may be negative"
        )
    if sort.inputs[0] is not router.outputs[1]:
        raise NoMatch("the experts have a capacity, which the operator does not support")
    if columns(router) != up.ends.shape[0]:
        raise NoMatch("some experts of the router have no network (zero experts)")
    routing = Routing.of(router)
    if routing.scale <= 0 or (routing.score, routing.after) == ("none", "none"):
        raise NoMatch("the routing weights may be negative, and the operator computes a softmax")
    corrected = len(router.inputs) > 1 if router.name == "moe.route" else False
    corrected = corrected or bool(router.attrs.get("corrected"))
    once = (routing.score, routing.after) in (("softmax", "none"), ("none", "softmax"))
    divided = routing.renormalize or routing.after == "softmax"
    plain = not corrected and routing.groups == 1 and routing.scale == 1.0 and not routing.epsilon
    wide = routing.score_dtype == routing.choice_dtype == "f32"
    return router, once and divided and plain and wide


def _activation(first: Op, up: Grouped) -> tuple[Activation, bool]:
    """(activation, whether the second matrix is the gate): the body is compared with each
    activation of the kernel on random numbers. Raises NoMatch if none is equal."""
    count = len(up.matrices)
    if count > 2:
        raise NoMatch(
            f"{count} matrices feed the activation, and the operator supports one (fc1) "
            "or two (gate and up)"
        )
    generator = torch.Generator().manual_seed(0)
    shape = (97, int(str(first.outputs[0].shape[1])))
    inputs = [6 * torch.randn(shape, generator=generator) for _ in range(count)]
    expected = inputs[0] if first.body is None else run_graph(widen(first.body), inputs)[0]
    for turned in (False, True)[:count]:
        gate, other = (inputs[-1], inputs[0]) if turned else (inputs[0], inputs[-1])
        for candidate in _candidates(first.body, count):
            if torch.allclose(candidate(gate, other), expected, rtol=1e-5, atol=1e-5):
                return candidate, turned
    raise NoMatch("no activation_type of the CPU kernel computes the activation of these experts")


def _candidates(body: Graph | None, matrices: int) -> Iterator[Activation]:
    """The activations of the kernel with the constants of the body."""
    if matrices == 1:
        yield from (Activation(kind) for kind in _FUNCTIONS)
        return
    numbers = {
        float(attr)
        for op in (body.ops if body else ())
        for attr in op.attrs.values()
        if isinstance(attr, int | float) and not isinstance(attr, bool)
    }
    for limit in (None, *(n for n in sorted(numbers) if n > 0)):
        for alpha in (1.0, *sorted(numbers)):
            for beta in (0.0, 1.0):
                yield Activation("swiglu", alpha, beta, limit)


def write(w: NodeWriter, op: Op, block: Fused) -> str:
    """The node, followed by the addition of the addend."""
    up, down = block.up, block.down
    assert isinstance(up, GroupedLinear)
    assert isinstance(down, GroupedLinear)
    x = w.read(block.x)
    logits, total = _router_probs(w, block)
    inputs = [x, logits, _interleaved(w, ordered(block, up.matrices))]
    inputs += [_interleaved(w, ordered(block, up.biases)) if up.biases else ""]
    inputs += [w.read(down.matrices[0])]
    inputs += [w.read(down.biases[0])] if down.biases else []
    output = w("MoE", *inputs, domain=MICROSOFT, **attributes(block, normalize=1))
    if total:
        output = w("Mul", output, total)
    return finished(w, op, block, output, block.x.dtype)


def ordered(block: Fused, stacks: Sequence[Value]) -> Sequence[Value]:
    """The stacks with gate first."""
    return stacks[::-1] if block.swapped else stacks


def attributes(block: Fused, normalize: int) -> dict[str, object]:
    """The attributes that MoE and QMoE share."""
    attrs: dict[str, object] = {
        "k": block.k,
        "activation_type": block.activation.kind,
        "normalize_routing_weights": normalize,
    }
    if block.activation.kind == "swiglu":
        attrs |= {"swiglu_fusion": 1, "activation_alpha": block.activation.alpha}
        attrs |= {"activation_beta": block.activation.beta}
    if block.activation.limit is not None:
        attrs["swiglu_limit"] = block.activation.limit
    return attrs


def finished(w: NodeWriter, op: Op, block: Fused, output: str, dtype: str) -> str:
    """The node's result in the dtype of the block's result, plus the addend."""
    output = w.cast(output, dtype, op.outputs[0].dtype)
    if block.addend is not None:
        addend = w.cast(w.read(block.addend), block.addend.dtype, op.outputs[0].dtype)
        output = w("Add", output, addend)
    return output


def _router_probs(w: NodeWriter, block: Fused) -> tuple[str, str]:
    """(the kernel's input router_probs, a factor of its result or "")."""
    dtype = block.x.dtype
    if block.normal:
        return w.cast(logits_of(w, block.router)[0], router_dtype(block.router), dtype), ""
    weights, ids = block.router.outputs
    row_weights = w.cast(w.read(weights), weights.dtype, "f32")
    shape = w.shape((weights.shape[0], block.experts))
    none = w("Expand", w.constant(float("-inf"), "f32"), shape)
    logs = w("Log", w("Max", row_weights, w.constant(SMALLEST, "f32")))
    probs = w("ScatterElements", none, w.read(ids), logs, axis=-1)
    total = w("ReduceSum", row_weights, w.constant([-1]), keepdims=1)
    return w.cast(probs, "f32", dtype), w.cast(total, "f32", dtype)


def _interleaved(w: NodeWriter, stacks: Sequence[Value]) -> str:
    """Alternating rows of gate and up, [E, 2H, D] from two [E, H, D]; a single stack is
    unchanged."""
    if len(stacks) == 1:
        return w.read(stacks[0])
    for stack in stacks:
        if not w.is_param(stack):
            raise NoMatch(f"the weight {stack.name} is computed, so it cannot be interleaved")
    experts, hidden, *rest = (int(str(d)) for d in stacks[0].shape)
    names = tuple(stack.name for stack in stacks)
    stored = Weight(names, stacks[0].dtype, (experts, 2 * hidden, *rest), in_turn)
    return w.weight(f"{names[0]}.interleaved", stored)


def in_turn(*tensors: torch.Tensor) -> torch.Tensor:
    """Alternating rows of each expert, [E, n*H, ..] from n tensors [E, H, ..]."""
    return torch.stack(tensors, dim=2).flatten(1, 2)
