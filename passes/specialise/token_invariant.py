"""Constant propagation for values that are the same for every token.

    task = 3                                known: 3
    row = aten.embedding(w, task)           known: w[3]
    all = aten.expand(row) <(B*S, 8)>       known: one row [1, 8] for all B*S

A constant is stored with size 1 for every axis of a named size; the value is that tensor repeated
along these axes. An op is evaluated on constants if it treats the positions of such axes
independently, so that its result repeats too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from moec.errors import NoMatch, UsageError
from moec.ir.graph import Attr, Op, Program, Value
from moec.ir.interpret.evaluate import run_op
from moec.ir.sizes.dims import Dim, symbols
from moec.ir.traits import PRODUCTS, is_elementwise
from moec.passes.core.moe_layer import constant
from moec.passes.core.rewrite import sizes_in

_AXES = {  # kinds that read several positions of an axis, with the axis if `dim` is absent
    **dict.fromkeys("slice cat split_with_sizes select index_select gather".split(), 0),
    **dict.fromkeys("softmax log_softmax topk sort layer_norm rms_norm".split(), -1),
    **dict.fromkeys("cumsum argmax argmin amax amin sum mean max min any all".split(), None),
    "linalg_vector_norm": None,
}
_CREATION = frozenset("full zeros ones scalar_tensor new_zeros new_ones full_like".split())
_MOVES = frozenset("reshape expand permute embedding index stack".split())
_SHAPES = ("size", "shape")


@dataclass
class TokenInvariantAnalysis:
    """The `constants` of a program, computed from those of its `seeds`.

    Raises UsageError if an op fails on them."""

    program: Program
    seeds: Mapping[Value, torch.Tensor]
    constants: dict[Value, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.constants = dict(self.seeds)
        self.stored: dict[Value, torch.Tensor | None] = {}
        self.sizes: dict[str, int] = {}  # sizes that are read from constants
        for op in self.program.graph.ops:
            if any(value in self.constants for value in op.inputs) or _read(op) & set(self.sizes):
                self.follow(op)

    def follow(self, op: Op) -> None:
        """Adds the op's results if its inputs are constants and it keeps repeated axes apart."""
        tensors = [self.of(value) for value in op.inputs]
        constants = [t for t in tensors if t is not None]
        results = _run(op, constants, self.sizes) if len(constants) == len(tensors) else None
        if results is not None:
            self.constants |= dict(zip(op.outputs, results, strict=True))
            if op.name == "moec.size":
                self.sizes[str(op.attrs["name"])] = int(results[0])

    def of(self, value: Value) -> torch.Tensor | None:
        """The constant of a value, or its content if the model stores it."""
        if value in self.constants:
            return self.constants[value]
        if value not in self.stored:
            self.stored[value] = self._stored(value)
        return self.stored[value]

    def _stored(self, value: Value) -> torch.Tensor | None:
        op = self.program.graph.producers.get(value)
        if op is not None and not op.inputs and _kind(op) in _CREATION:
            results = _run(op, [], {})
            return None if results is None else results[op.outputs.index(value)]
        try:
            return constant(self.program, value)
        except NoMatch:
            return None


def _run(
    op: Op, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> tuple[torch.Tensor, ...] | None:
    """The results with size 1 for every other named size; None if they would not repeat."""
    if not _acts_on_each(op, tensors, sizes):
        return None
    try:
        results = run_op(op, tensors, dict.fromkeys(sizes_in(op), 1) | dict(sizes))
    except (IndexError, RuntimeError) as error:
        raise UsageError(f"{op} fails on what inputs are bound to: {error}") from None
    fits = all(
        tuple(tensor.shape) == tuple(1 if symbols(dim) else dim for dim in value.shape)
        for value, tensor in zip(op.outputs, results, strict=True)
    )
    return results if fits else None


def _acts_on_each(op: Op, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> bool:
    kind = _kind(op)
    named = {n for name, attr in op.attrs.items() if name not in _SHAPES for n in _names(attr)}
    if not named <= set(sizes):
        return False
    if is_elementwise(op.name) or op.name in ("moe.route", "moec.size"):
        return True
    if op.name in PRODUCTS:
        return not symbols(op.inputs[PRODUCTS[op.name]].shape[-1])
    if kind in _AXES:
        operands = op.inputs[:1] if kind == "index_select" else op.inputs
        return not any(symbols(v.shape[axis]) for v in operands for axis in _axes(op, v))
    if kind == "reshape":
        leads = _named_axes_lead(op.inputs[0].shape) and _named_axes_lead(op.outputs[0].shape)
        return leads or all(t.numel() == 1 for t in tensors)
    if kind in ("embedding", "index"):
        return not any(symbols(dim) for dim in op.inputs[0].shape)
    return kind in _CREATION or kind in _MOVES


def _axes(op: Op, value: Value) -> list[int]:
    """The axes along which an op combines positions; all axes if it has no `dim`."""
    rank = len(value.shape)
    axes = op.attrs.get("dim", _AXES[_kind(op)])
    if axes is None:
        return list(range(rank))
    listed = axes if isinstance(axes, tuple) else (axes,)
    return [axis for axis in listed if isinstance(axis, int) and -rank <= axis < rank]


def _read(op: Op) -> set[str]:
    """The named sizes in an op's attributes."""
    return {name for attr in op.attrs.values() for name in _names(attr)}


def _names(attr: Attr) -> set[str]:
    if isinstance(attr, tuple):
        return {name for item in attr for name in _names(item)}
    return symbols(attr) if isinstance(attr, sympy.Expr) else set()


def _named_axes_lead(shape: Sequence[Dim]) -> bool:
    """Whether axes of named sizes precede all other axes of more than one element: then a reshape
    does not mix axes that repeat with axes that do not."""
    has_name = [bool(symbols(dim)) for dim in shape if dim != 1]
    return has_name == sorted(has_name, reverse=True)


def _kind(op: Op) -> str:
    return op.name.split(".")[1]


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
