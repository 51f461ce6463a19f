"""Bodies of experts run over all rows at once.

    out = moe.experts(rows, ends, w1, w2) {       h = grouped.linear(rows, ends, w1)
      h = linear(x, b1)                            a = aten.silu(h)
      a = silu(h)                          ->      out = grouped.linear(a, ends, w2)
      y = linear(a, b2) }

A linear becomes one grouped.linear over the stacked weights. A row-wise op is applied to all rows
at once. A param of a row-wise op (the weight of a norm, a scale) is gathered per row, by the row's
expert. Choices that no expert takes have the rows after the last end, which are 0 after a grouped
linear; a body that ends in another op, as x + linear(x) does, is followed by one that clears them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Graph, Op, Program, Ref, Stage, TensorType, Value
from moec.ir.ops.experts.dispatch import chooses_all
from moec.ir.sizes.dims import Dim, canonical, symbol, symbols
from moec.ir.traits import CASTS, IDENTITIES, VIEWS, is_elementwise, is_pointwise
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass

_ROWWISE = frozenset(
    {
        "aten.mean.dim",
        "aten.sum.dim_IntList",
        "aten.amax.default",
        "aten.softmax.int",
        "aten.layer_norm.default",
        "nn.rms_norm",
        "aten.slice.Tensor",
        "aten.split_with_sizes.default",
        "aten.cat.default",
    }
)
_KEEP_ZERO = (
    CASTS | VIEWS | {f"aten.{name}.default" for name in ("gelu", "neg", "relu", "silu", "tanh")}
)
"""Ops that make 0 of 0."""
_SCORES = {"moe.route": (0, -1), "moe.gate": (1, 0), "aten.topk.default": (0, -1)}
"""Ops that choose experts: the input with an axis of all that they choose among, and this axis."""
_SHAPES = frozenset({"aten.reshape.default", "aten.expand.default"})


@dataclass(frozen=True)
class ExpandExperts(Pass):
    """Run the bodies of experts over all rows at once: linears become grouped linears."""

    name: ClassVar[str] = "expand-experts"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.GROUPED

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand_experts, log), program.weights)


def expand_experts(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.experts" or op.body is None:
        return None
    return _Expansion(op, op.body, b).outputs()


class _Expansion:
    """The expansion of one body. Its values become rows [R, ...] or stacks of weights [E, ...]."""

    def __init__(self, op: Op, body: Graph, b: Builder) -> None:
        self.op, self.body, self.b = op, body, b
        rows, self.ends, *stacks = op.inputs
        (row_size,) = {name for name in symbols(body.inputs[0].shape[0])} or {""}
        self.size = {symbol(row_size): rows.shape[0]} if row_size else {}
        self.count = rows.shape[0]
        self.rows: dict[Value, Value] = {body.inputs[0]: rows}
        self.stacks: dict[Value, Value] = dict(zip(body.params, stacks, strict=True))
        self.gathered: dict[Value, Value] = {}

    def outputs(self) -> tuple[Value, ...]:
        for inner in self.body.ops:
            if inner.name in IDENTITIES:
                (source,), (output,) = inner.inputs, inner.outputs
                values = self.rows if source in self.rows else self.stacks
                values[output] = values[source]
            elif all(v in self.stacks for v in inner.inputs) and inner.inputs:
                self.stack_op(inner)
            elif inner.name == "aten.linear.default":
                self.linear(inner)
            elif inner.name == "aten.layer_norm.default" and len(inner.inputs) > 1:
                self.layer_norm(inner)
            elif is_elementwise(inner.name) or inner.name in _ROWWISE or _shapes_rows(inner):
                self.row_op(inner)
            else:
                raise NoMatch(
                    f"an expert's body holds {inner.name}, which does not act on single rows"
                )
        result = self.rows.get(self.body.outputs[0])
        if result is None:
            raise NoMatch("an expert's result does not depend on its rows")
        if self.may_drop() and not self.clears(self.body.outputs[0]):
            result = self.cleared(result)
        return (result,)

    def may_drop(self) -> bool:
        """Whether there may be choices that no expert takes."""
        graph, experts = self.b.graph, self.ends.shape[0]
        sort = graph.producers.get(self.op.inputs[0])
        if sort is None or sort.name != "moe.dispatch":
            return True
        if chooses_all(graph, sort):
            return False
        choice = graph.producers.get(sort.inputs[1])
        while choice is not None and choice.name in VIEWS:
            choice = graph.producers.get(choice.inputs[0])
        if choice is None or choice.name not in _SCORES:
            return True
        scores, axis = _SCORES[choice.name]
        return choice.inputs[scores].shape[axis] != experts  # others have no network

    def clears(self, value: Value) -> bool:
        """Whether a value of the body is 0 in rows without an expert."""
        op = self.body.producers.get(value)
        if op is None or op.name == "aten.linear.default":
            return op is not None
        return op.name in _KEEP_ZERO and self.clears(op.inputs[0])

    def cleared(self, rows: Value) -> Value:
        """The rows, 0 after the last end."""
        like, flags = self.op, TensorType("bool", (self.count,))
        indices, last = TensorType("i64", (self.count,)), TensorType("i32", ())
        (row,) = self.b.emit(
            "aten.arange.default", [], [indices], like=like, attrs={"end": self.count}
        )
        (end,) = self.b.emit(
            "aten.select.int", [self.ends], [last], like=like, attrs={"dim": 0, "index": -1}
        )
        (beyond,) = self.b.emit("aten.ge.Tensor", [row, end], [flags], like=like)
        mask = self.b.reshape(beyond, (self.count, *[1] * (len(rows.shape) - 1)), like=like)
        return self.b.emit(
            "aten.masked_fill.Scalar", [rows, mask], [rows.type], like=like, attrs={"value": 0}
        )[0]

    def linear(self, inner: Op) -> None:
        x, weight, *bias = inner.inputs
        if x not in self.rows or any(v not in self.stacks for v in (weight, *bias)):
            raise NoMatch("a linear layer of an expert does not multiply rows by a weight")
        inputs = [self.rows[x], self.ends, self.stacks[weight], *(self.stacks[v] for v in bias)]
        attrs: dict[str, Attr] = {"matrices": 1, "dtype": DType(inner.outputs[0].dtype)}
        if bias:
            attrs["biased"] = True
        (output,) = self.b.emit(
            "grouped.linear", inputs, like=self.op, attrs=attrs, named=inner.outputs[0].name
        )
        self.rows[inner.outputs[0]] = output

    def row_op(self, inner: Op) -> None:
        """The same op over all rows. No attribute changes: axes are counted from the end, or the
        op's operand has two axes."""
        rank = len(inner.outputs[0].shape)
        inputs = [self.rows[v] if v in self.rows else self.gather(v, rank) for v in inner.inputs]
        attrs = {name: self.attr(value) for name, value in inner.attrs.items()}
        types = [TensorType(v.dtype, self.shape(v)) for v in inner.outputs]
        named = inner.outputs[0].name
        outputs = self.b.emit(inner.name, inputs, types, like=self.op, attrs=attrs, named=named)
        self.rows |= dict(zip(inner.outputs, outputs, strict=True))

    def layer_norm(self, inner: Op) -> None:
        """A layer norm without weight and bias, followed by a product with the weight and a sum
        with the bias of each row's expert."""
        x, *affine = inner.inputs
        (value,) = inner.outputs
        plain = replace(inner, inputs=(x,))
        self.row_op(plain)
        for name, param in zip(("aten.mul.Tensor", "aten.add.Tensor"), affine, strict=False):
            inputs = [self.rows[value], self.gather(param, len(value.shape))]
            types = [TensorType(value.dtype, self.shape(value))]
            (self.rows[value],) = self.b.emit(name, inputs, types, like=self.op, named=value.name)

    def stack_op(self, inner: Op) -> None:
        """An op on params alone: the same on the stack, its axes moved by one."""
        if inner.name == "aten.permute.default":
            dims = inner.attrs["dims"]
            assert isinstance(dims, tuple)
            rank = len(dims)
            moved: Attr = (0, *(int(d) % rank + 1 for d in dims))
            attrs: dict[str, Attr] = {"dims": moved}
        elif inner.name == "aten.slice.Tensor":
            axis = inner.attrs.get("dim", 0)
            assert isinstance(axis, int)
            attrs = {**inner.attrs, "dim": axis % len(inner.inputs[0].shape) + 1}
        elif is_pointwise(inner) and len(inner.inputs) == 1:
            attrs = dict(inner.attrs)
        else:
            raise NoMatch(f"an expert's body computes {inner.name} from its weights alone")
        experts = self.ends.shape[0]
        (value,) = inner.outputs
        types = [TensorType(value.dtype, (experts, *value.shape))]
        inputs = [self.stacks[v] for v in inner.inputs]
        outputs = self.b.emit(
            inner.name, inputs, types, like=self.op, attrs=attrs, named=value.name
        )
        self.stacks[value] = outputs[0]

    def gather(self, param: Value, rank: int) -> Value:
        """param[expert of row] for each row, [R, 1, ..., *param.shape]: of `rank` axes, since
        operands meet from their last axes and R must meet the rows."""
        value = self.of_each_row(param)
        missing = rank - 1 - len(param.shape)
        return self.b.reshape(value, (self.count, *[1] * missing, *param.shape), like=self.op)

    def of_each_row(self, param: Value) -> Value:
        """param[expert of row] for each row: [R, *param.shape]."""
        if param not in self.gathered:
            if len(param.shape) > 1:
                raise NoMatch(f"an expert uses its weight {param} outside a linear layer")
            stack = self.stacks[param]
            count: Attr = self.count
            (owner,) = self.b.emit(
                "grouped.expert_of", [self.ends], like=self.op, attrs={"rows": count}
            )
            types = [TensorType(stack.dtype, (self.count, *param.shape))]
            (self.gathered[param],) = self.b.emit(
                "aten.index.Tensor",
                [stack, owner],
                types,
                like=self.op,
                attrs={"indices": (Ref(1),)},
                named=param.name,
            )
        return self.gathered[param]

    def shape(self, value: Value) -> tuple[Dim, ...]:
        return tuple(self.dim(d) for d in value.shape)

    def dim(self, dim: Dim) -> Dim:
        return dim if isinstance(dim, int) else canonical(dim.subs(self.size))

    def attr(self, attr: Attr) -> Attr:
        if isinstance(attr, tuple):
            return tuple(self.attr(item) for item in attr)
        return self.dim(attr) if isinstance(attr, sympy.Expr) else attr


def _shapes_rows(op: Op) -> bool:
    """Whether an op changes the shape of each row alone, [R] to [R, 1] (a gate of the expert)."""
    return op.name in _SHAPES and op.inputs[0].shape[:1] == op.outputs[0].shape[:1]
