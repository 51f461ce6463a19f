"""A linear layer of an expert whose readers only slice its result becomes one layer per slice.

    gu = linear(x, gate_up)                    g = linear(x, gate_up_0)
    g  = slice(gu, -1, 0, H)           ->      u = linear(x, gate_up_1)
    u  = slice(gu, -1, H, 2*H)

The stacked weight and bias are sliced in the same way outside the body; these slices are views and
cost nothing. Contiguous halves and interleaved columns (step 2, GPT-OSS) are both supported.
Kernels then read gate and up as two weights, and pack them in the order in which they stream them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.ir.graph import Graph, Op, Program, Stage, TensorType, Value
from moec.passes.core.rewrite import Builder, drop_dead, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class SplitPacked(Pass):
    """Split packed gate-and-up weights of experts into the parts that the body uses."""

    name: ClassVar[str] = "split-packed"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, split_packed, log), program.weights)


@dataclass(frozen=True)
class _Cut:
    start: int
    stop: int
    step: int

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


def split_packed(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.experts" or op.body is None:
        return None
    body, stacks = op.body, dict(zip(op.body.params, op.inputs[2:], strict=True))
    changed = False
    for linear in op.body.ops:
        cuts = _cuts(linear, body) if linear.name == "aten.linear.default" else None
        if cuts is None or any(v not in stacks for v in linear.inputs[1:]):
            continue
        body, stacks = _split(linear, cuts, body, stacks, op, b)
        changed = True
    if not changed:
        return None
    body = drop_dead(body)
    inputs = [*op.inputs[:2], *(stacks[param] for param in body.params)]
    return b.emit("moe.experts", inputs, like=op, attrs=op.attrs, body=body)


def _cuts(linear: Op, body: Graph) -> dict[Value, _Cut] | None:
    """The columns of the linear's result that each of its readers slices; None if one does not."""
    result = linear.outputs[0]
    width = result.shape[-1]
    if result in body.results or not isinstance(width, int):
        return None
    cuts: dict[Value, _Cut] = {}
    for reader in body.readers.get(result, ()):
        axis = reader.attrs.get("dim", 0)
        last = isinstance(axis, int) and axis % len(result.shape) == len(result.shape) - 1
        if not last:
            return None
        if reader.name == "aten.slice.Tensor":
            cuts[reader.outputs[0]] = _slice(reader, width)
        elif reader.name in ("aten.split_with_sizes.default", "aten.split.Tensor"):
            start = 0
            for part in reader.outputs:
                size = part.shape[-1]
                if not isinstance(size, int):
                    return None
                cuts[part] = _Cut(start, start + size, 1)
                start += size
        else:
            return None
    return cuts or None


def _slice(op: Op, width: int) -> _Cut:
    start, end, step = (op.attrs.get(name) for name in ("start", "end", "step"))
    low = min(start % width if isinstance(start, int) and start < 0 else start or 0, width)  # type: ignore[type-var]
    high = width if end is None else end
    high = min(high % width if isinstance(high, int) and high < 0 else high, width)  # type: ignore[type-var]
    return _Cut(int(low), int(high), step if isinstance(step, int) else 1)  # type: ignore[arg-type]


def _split(
    linear: Op,
    cuts: dict[Value, _Cut],
    body: Graph,
    stacks: dict[Value, Value],
    op: Op,
    b: Builder,
) -> tuple[Graph, dict[Value, Value]]:
    """The body with one linear per cut, and the stacks of its params."""
    params = list(body.params)
    stacks = dict(stacks)
    linears: list[Op] = []
    for value, cut in cuts.items():
        parts = []
        for source in linear.inputs[1:]:
            shape = (len(cut), *source.shape[1:])
            param = Value(f"{source.name}_{value.name}", TensorType(source.dtype, shape))
            params.append(param)
            stacks[param] = _cut_stack(stacks[source], cut, op, b)
            parts.append(param)
        linears.append(replace(linear, inputs=(linear.inputs[0], *parts), outputs=(value,)))
    cutters = {reader for reader in body.readers[linear.outputs[0]]}
    ops: list[Op] = []
    for inner in body.ops:
        if inner is linear:
            ops += linears
        elif inner not in cutters:
            ops.append(inner)
    return replace(body, params=tuple(params), ops=tuple(ops)), stacks


def _cut_stack(stack: Value, cut: _Cut, op: Op, b: Builder) -> Value:
    """The rows of a stacked weight [E, N, K] or bias [E, N] that compute these columns."""
    shape = (stack.shape[0], len(cut), *stack.shape[2:])
    attrs = {"dim": 1, "start": cut.start, "end": cut.stop, "step": cut.step}
    (part,) = b.emit(
        "aten.slice.Tensor",
        [stack],
        [TensorType(stack.dtype, shape)],
        like=op,
        attrs=attrs,
        named=stack.name,
    )
    return part
