"""Attention split by heads: each of A ranks computes some heads for the texts of all A (arXiv
1909.08053).

    q, k, v = linear(x, wq), …       counts = dist.all_gather(dist.row_count(x)) <group="tp.A">
    y = nn.attention(q, k, v)        all = dist.all_gather(x, counts) <group="tp.A">
    out = linear(y, wo)        ->    q, k, v = linear(all, wq[heads of this rank]), …
                                     y = nn.attention(q, k, v)
                                     part = linear(y, wo[:, heads of this rank])
                                     out = dist.reduce_scatter(part, counts) <group="tp.A">

Each rank has its own texts. Values with an axis of texts are gathered from the group, and a
reduce-scatter returns to each rank the sums of its own texts (arXiv 2205.05198). The keys and
values of a head stay on the rank of that head, for the texts of all A ranks. A must divide the
number of heads and of key-value heads; sinks are split with the heads. In latent attention each
rank computes the latent vectors of its own texts; they are gathered in place of x, and wq and wk
are the layers that read them. A applies to attention only: the experts of the same layer may be
split differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from moec.errors import NoMatch
from moec.ir.graph import Attr, Op, Program, State, TensorType, Value
from moec.ir.opdef import OPS
from moec.ir.ops.dense.attention import Attention
from moec.ir.sizes.dims import Bounds, Dim, symbol
from moec.passes.core.moe_layer import constant
from moec.passes.core.rewrite import Builder, drop_dead
from moec.passes.core.runner import Log
from moec.passes.parallel.heads import Heads, heads_of
from moec.plan.groups import tp_group, tp_texts
from moec.plan.plan import Plan


def cut_attention(program: Program, plan: Plan, rank: int, log: Log) -> Program:
    """The program with this rank's heads. Attention that cannot be split as planned is computed in
    full on every rank, and the log has the reason."""
    graph = program.graph
    if all(layer.attention == 1 for layer in plan.layers):
        return program
    attentions = [op for op in graph.ops if op.name == "nn.attention"]
    if len(attentions) != len(plan.layers):
        log.decline(
            "(whole model)",
            f"attention is replicated on every rank: the model has {len(attentions)} attentions, "
            f"the plan {len(plan.layers)} layers",
        )
        return program
    cut: list[tuple[Heads, int]] = []
    for op, layer in zip(attentions, plan.layers, strict=True):
        if layer.attention == 1:
            continue
        try:
            cut.append((heads_of(program, op, layer.attention), layer.attention))
        except NoMatch as why:
            log.decline(op.origin, f"attention of degree {layer.attention}: {why}")
    return _Rewrite(program, rank).run(cut) if cut else program


# The attribute that holds the shape of an op's output.
_SIZED = {
    "aten.reshape.default": "shape",
    "aten.expand.default": "size",
    "aten.empty.memory_format": "size",
}


@dataclass
class _Rewrite:
    program: Program
    rank: int
    ops: list[Op] = field(default_factory=list)
    new: dict[Value, Value] = field(default_factory=dict)
    weights: dict[Value, torch.Tensor] = field(default_factory=dict)
    gathered: dict[tuple[Value, int], Value] = field(default_factory=dict)
    counts: dict[int, Value] = field(default_factory=dict)
    bounds: dict[str, Bounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = Builder(self.program.graph)

    def run(self, cut: Sequence[tuple[Heads, int]]) -> Program:
        graph, weights = self.program.graph, self.program.weights
        of = {op: (heads, degree) for heads, degree in cut for op in heads.ops}
        for heads, degree in cut:
            for cache in heads.caches:
                self.bounds[tp_texts(degree)] = Bounds(0, None)
                self.new[cache] = Value(cache.name, _cut_type(cache, 1, heads, degree))
        for op in graph.ops:
            if op in of:
                self._cut(op, *of[op])
            else:
                self.ops.append(op)
        inputs = tuple(self.new.get(value, value) for value in graph.inputs)
        states = tuple(
            State(self.new.get(s.before, s.before), self.new.get(s.after, s.after))
            for s in graph.states
        )
        result = replace(
            graph,
            inputs=inputs,
            params=(*graph.params, *self.weights),
            ops=tuple(self.ops),
            states=states,
            bounds={**graph.bounds, **self.bounds},
        )
        stored = {**weights, **{value.name: tensor for value, tensor in self.weights.items()}}
        result = drop_dead(result)
        names = [*(param.name for param in result.params), *(s.before.name for s in states)]
        return Program(result, {name: stored[name] for name in names if name in stored})

    def _cut(self, op: Op, heads: Heads, degree: int) -> None:
        if op is heads.output:
            self._summed(op, heads, degree)
            return
        inputs = tuple(self._input(value, heads, degree, op) for value in op.inputs)
        outputs = []
        for value in op.outputs:
            type = _cut_type(value, heads.axes[value], heads, degree)
            self.new[value] = Value(self.names.fresh(value.name), type)
            outputs.append(self.new[value])
        attrs = dict(op.attrs)
        if op.name in _SIZED:
            attrs[_SIZED[op.name]] = outputs[0].shape
        self.ops.append(replace(op, inputs=inputs, outputs=tuple(outputs), attrs=attrs))

    def _input(self, value: Value, heads: Heads, degree: int, op: Op) -> Value:
        if value in self.new:
            return self.new[value]
        linear = op.name == "aten.linear.default" and value is not op.inputs[0]
        if linear or (op.name == "nn.attention" and value is Attention.of(op).sinks):
            rows = constant(self.program, value).chunk(degree)[self._at(degree)]
            return self._weight(value, rows)
        if value.shape and value.shape[0] == heads.texts:
            return self._gather(value, degree, op)
        return value

    def _summed(self, op: Op, heads: Heads, degree: int) -> None:
        """The product with this rank's columns of the weight, and its sum over the ranks."""
        x, weight, *bias = op.inputs
        columns = constant(self.program, weight).chunk(degree, 1)[self._at(degree)].contiguous()
        inputs = [self.new[x], self._weight(weight, columns)]
        for value in bias:  # only one rank adds the bias
            tensor = constant(self.program, value)
            first = self._at(degree) == 0
            inputs.append(self._weight(value, tensor if first else torch.zeros_like(tensor)))
        (out,) = op.outputs
        type = TensorType(out.dtype, _with_texts(out.shape, heads, degree))
        part = Value(self.names.fresh(out.name), type)
        self.ops.append(replace(op, inputs=tuple(inputs), outputs=(part,)))
        scattered = (part, self.counts[degree])
        self._emit("dist.reduce_scatter", scattered, op, degree, out, rows=heads.texts)

    def _gather(self, value: Value, degree: int, op: Op) -> Value:
        """The rows of `value` from all ranks of the group."""
        if (value, degree) not in self.gathered:
            if degree not in self.counts:
                self._count(value, degree, op)
            inputs = value, self.counts[degree]
            rows = symbol(tp_texts(degree))
            result = self._emit("dist.all_gather", inputs, op, degree, rows=rows)
            self.gathered[value, degree] = result
        return self.gathered[value, degree]

    def _count(self, value: Value, degree: int, op: Op) -> None:
        """Gathers the ranks' numbers of texts; if no cache has their sum as an axis, it becomes a
        named size."""
        name = tp_texts(degree)
        count = self._emit("dist.row_count", (value,), op)
        self.counts[degree] = self._emit("dist.all_gather", (count,), op, degree, rows=degree)
        if name not in self.bounds:
            total = Value(self.names.fresh(name), TensorType("i64", ()))
            inputs = (self.counts[degree],)
            self.ops.append(Op("aten.sum.default", inputs, (total,), {}, None, op.origin))
            self._emit("moec.size", (total,), op, name=name)
            self.bounds[name] = Bounds(0, None)

    def _emit(
        self, kind: str, inputs: tuple[Value, ...], like: Op, degree: int | None = None,
        output: Value | None = None, **attrs: Attr,
    ) -> Value:  # fmt: skip
        group: dict[str, Attr] = {} if degree is None else {"group": tp_group(degree)}
        draft = Op(kind, inputs, (), {**group, **attrs}, None, like.origin)
        (type,) = OPS[kind].infer(draft)
        value = output or Value(self.names.fresh(kind.partition(".")[2]), type)
        self.ops.append(replace(draft, outputs=(value,)))
        return value

    def _weight(self, value: Value, tensor: torch.Tensor) -> Value:
        type = TensorType(value.dtype, tuple(tensor.shape))
        param = Value(self.names.fresh(value.name), type)
        self.weights[param] = tensor.contiguous()
        return param

    def _at(self, degree: int) -> int:
        """This rank's position in its group, which is also that of its heads."""
        return self.rank % degree


def _with_texts(shape: tuple[Dim, ...], heads: Heads, degree: int) -> tuple[Dim, ...]:
    texts = symbol(tp_texts(degree))
    return tuple(
        dim if isinstance(dim, int) else dim.subs(heads.texts, texts)  # S stays
        for dim in shape
    )


def _cut_type(value: Value, axis: int, heads: Heads, degree: int) -> TensorType:
    """The type of `value` with this rank's heads and the texts of all ranks of the group."""
    shape = list(_with_texts(value.shape, heads, degree))
    size = shape[axis]
    assert isinstance(size, int)
    shape[axis] = size // degree
    return TensorType(value.dtype, tuple(shape))
