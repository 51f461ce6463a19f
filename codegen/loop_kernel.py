"""A group as one PrimFunc: its arguments are the group's inputs, sizes and outputs, in this
order."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import sympy
from tvm import tirx
from tvm.ir import Var
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.fusion import FusionGroup
from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Position, Sizes, names
from moec.codegen.loops.rules import EMIT
from moec.ir.graph import Attr, Op, Ref, Value
from moec.ir.sizes.dims import Dim, product
from moec.target.cpu import CpuTarget

_CUTTING = ("aten.cat.default", "aten.stack.default", "nn.rotary")


@dataclass(frozen=True)
class LoopKernel:
    """`sizes` are the named sizes that the function takes after its input buffers."""

    function: PrimFunc
    sizes: tuple[str, ...]


def describe(group: FusionGroup) -> tuple[str, tuple[str, ...]]:
    """A text that is equal for two groups if one kernel serves both, and the sizes in its order.

    Values are numbered, and sizes renamed, in order of appearance.
    """
    numbers = {value: number for number, value in enumerate(group.inputs)}
    lines = [f"{v.dtype}{list(v.shape)}" for v in group.inputs]
    for op in group.ops:
        for value in op.outputs:
            numbers[value] = len(numbers)
        inputs = [numbers[v] for v in op.inputs]
        outputs = [f"{v.dtype}{list(v.shape)}" for v in op.outputs]
        attrs = [f"{name}={_text(value)}" for name, value in sorted(op.attrs.items())]
        lines.append(f"{op.name} {inputs} {attrs} {outputs}")
    text = "\n".join(lines)
    used = sizes_of(group)
    order: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        name = match.group(0)
        return order.setdefault(name, f"${len(order)}") if name in used else name

    return re.sub(r"\b[A-Za-z_]\w*\b", rename, text), tuple(order)


def sizes_of(group: FusionGroup) -> set[str]:
    size_names: set[str] = set()
    for value in group.inputs:
        size_names |= names(*value.shape)
    for op in group.ops:
        for value in op.outputs:
            size_names |= names(*value.shape)
        for attr in op.attrs.values():
            size_names |= _attr_sizes(attr)
    return size_names


def _attr_sizes(attr: Attr) -> set[str]:
    if isinstance(attr, tuple):
        return {name for item in attr for name in _attr_sizes(item)}
    return names(attr) if isinstance(attr, sympy.Expr) else set()


def _text(attr: Attr) -> str:
    if isinstance(attr, tuple):
        return "(" + ",".join(map(_text, attr)) + ")"
    return f"#{attr.index}" if isinstance(attr, Ref) else repr(attr)


def write(group: FusionGroup, name: str, target: CpuTarget) -> LoopKernel:
    """The kernel of a group for a CPU."""
    with kernel(name, target) as frame:
        sizes = write_body(group, partial(Emission, target=target))
    return LoopKernel(frame.function, sizes)


def write_body(group: FusionGroup, make: Callable[..., Emission]) -> tuple[str, ...]:
    """Writes the arguments and the loops of a group into the open frame, with the emission that
    `make` creates. Returns the named sizes that the kernel takes."""
    root = group.root
    order = sorted(sizes_of(group))
    variables = {size: T.int64() for size in order}
    sizes = Sizes(variables, inside_kernel=True)
    flat = is_flat(group)
    inputs = {v: _argument(f"a{i}", v, sizes) for i, v in enumerate(group.inputs)}
    bound = {d.name for v in group.inputs for d in v.shape if isinstance(d, sympy.Symbol)}
    free = tuple(size for size in order if size not in bound)
    for size in free:
        T.arg(size, variables[size])
    outputs = {v: _argument(f"y{i}", v, sizes) for i, v in enumerate(root.outputs)}
    inputs = {v: _as_viewed(v, buffer, sizes, flat) for v, buffer in inputs.items()}
    outputs = {v: _as_viewed(v, buffer, sizes, flat) for v, buffer in outputs.items()}
    producers = {value: op for op in group.ops for value in op.outputs}
    _body(make(inputs, outputs, producers, sizes, flat=flat), group)
    return free


def _argument(name: str, value: Value, sizes: Sizes) -> Buffer:
    shape: list[object] = [sizes.expr(d) for d in value.shape]
    if value.dtype == "c64":
        shape.append(2)
    return argument(name, tuple(shape), sc.STORED[value.dtype])


def _as_viewed(value: Value, buffer: Buffer, sizes: Sizes, flat: bool) -> Buffer:
    """The buffer in the form that expressions index: bool as int8, one axis if that is enough."""
    if not flat and value.dtype != "bool":
        return buffer
    shape = [sizes.expr(product(value.shape))] if flat else list(buffer.shape)
    if flat and value.dtype == "c64":
        shape.append(2)
    stored = "int8" if value.dtype == "bool" else buffer.dtype
    return T.decl_buffer(tuple(shape), stored, data=buffer.data)


def is_flat(group: FusionGroup) -> bool:
    """Whether every op reads its inputs at the position it writes, so that one axis is enough."""
    shape = group.root.outputs[0].shape
    if len([dim for dim in shape if dim != 1]) < 2:
        return False
    for op in group.ops:
        rule = EMIT[op.name]
        if rule.point is None or not rule.same_position or op.outputs[0].shape != shape:
            return False
        if any(v.shape != shape and product(v.shape) != 1 for v in op.inputs):
            return False
    return True


def _body(e: Emission, group: FusionGroup) -> None:
    root = group.root
    loops = e.kernel(root)
    if loops is not None:
        loops(e, root)
        return
    weight = max(1, sum(EMIT[op.name].cost for op in group.ops))
    for out in root.outputs:
        shape: tuple[Dim, ...] = e.shape(out)
        if any(op.name in _CUTTING for op in group.ops):
            _find_cuts(e, out, shape)

        def element(at: Position, out: Value = out) -> None:
            e.store(out, at, e.read(out, at))

        e.elements(shape, element, weight)


def _find_cuts(e: Emission, out: Value, shape: tuple[Dim, ...]) -> None:
    """Computes one element without writing it, to find where concatenations change their source."""
    at = tuple(
        ix.const(0)
        if dim == 1
        else ix.loop(Var(f"i{axis}", tirx.Var("i", "int64").ty), f"axis{axis}", dim)
        for axis, dim in enumerate(shape)
    )
    with e.lazily():
        e.read(out, at)


__all__ = ["LoopKernel", "Op", "describe", "write"]
