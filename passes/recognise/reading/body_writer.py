"""Writes the body of one expert while a region is read, and records how each param is stacked.

A value of the body has one axis of rows, then one axis for each feature atom of its `ExpertLayout`,
in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.layout import (
    Atom,
    Axis,
    ExpertLayout,
    fused,
    only_features,
    size_of,
)
from moec.passes.recognise.region import Recipe, RegionEmitter


@dataclass(frozen=True)
class Fan:
    """The results of `body` of each expert over the rows `x`, concatenated.

    `one_expert_per_row`: each row goes through one expert, and the results are in the order of the
    rows, possibly with other axes. Otherwise every row goes through every expert.
    """

    x: Value
    body: Graph
    stacks: tuple[Recipe, ...]
    experts: int
    axes: tuple[Axis, ...]  # of the result of one branch
    uses: dict[str, list[Value]]
    one_expert_per_row: bool
    split: Op | None = None  # splits x by expert into parts whose sizes depend on data


@dataclass(frozen=True)
class Pick:
    """A param of the body: the axes `axes` of the weight `base`, in this order, reshaped to
    `sizes`."""

    base: Value
    axes: tuple[int, ...]
    sizes: tuple[Dim, ...]


@dataclass
class BodyWriter:
    """Writes one body. `alone`: the weights belong to one expert; otherwise they are stacks over
    `experts`."""

    alone: bool = False
    experts: int | None = None
    ops: list[Op] = field(default_factory=list)
    stacks: dict[Value, Recipe] = field(default_factory=dict)
    leaves: list[Value] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    memo: dict[tuple[object, ...], Value] = field(default_factory=dict)
    picks: dict[Value, Pick] = field(default_factory=dict)

    def fresh(self, name: str) -> str:
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        return name if not count else f"{name}_{count + 1}"

    def add(
        self,
        name: str,
        inputs: Sequence[Value],
        types: Sequence[TensorType],
        attrs: Mapping[str, Attr],
        stem: str,
    ) -> tuple[Value, ...]:
        outputs = tuple(Value(self.fresh(stem), type) for type in types)
        self.ops.append(Op(name, tuple(inputs), outputs, dict(attrs)))
        return outputs

    def reshape(self, base: Value, features: Sequence[Dim]) -> Value:
        target = TensorType(base.dtype, (ROWS, *features))
        if target == base.type:
            return base
        attrs: dict[str, Attr] = {"shape": target.shape}
        return self.add("aten.reshape.default", [base], [target], attrs, base.name)[0]

    def in_order(self, layout: ExpertLayout) -> ExpertLayout:
        """The layout with one atom per feature axis, in the axis order of the graph's value."""
        return self.ordered(layout, [a for a in layout.axes if a and only_features(a)])

    def ordered(
        self, layout: ExpertLayout, fuse: Sequence[Axis], last: bool = False
    ) -> ExpertLayout:
        """The layout with the atoms of `base` in the axis order of the graph's value, and each axis
        of `fuse` fused into one atom.

        With `last`, `fuse` has one axis, and it becomes the last axis of `base`.
        """
        if layout.param:
            return layout
        order = list(layout.features)
        if last:
            tail = [a for a in order if a in fuse[0]]
            order = [a for a in order if a not in tail] + tail
        base = layout.base
        if tuple(order) != layout.atoms:
            dims = (0, *(layout.atoms.index(a) + 1 for a in order))
            type = TensorType(base.dtype, tuple(base.shape[d] for d in dims))
            (base,) = self.add("aten.permute.default", [base], [type], {"dims": dims}, base.name)
        atoms: list[Atom] = []
        renamed: dict[Axis, Atom] = {}
        position = 0
        while position < len(order):
            axis = next((f for f in fuse if f and f[0] is order[position]), None)
            if axis is not None and len(axis) > 1:
                renamed[axis] = fused(axis)
                atoms.append(renamed[axis])
                position += len(axis)
            else:
                atoms.append(order[position])
                position += 1
        base = self.reshape(base, tuple(a.size for a in atoms))
        if last and not fuse[0]:  # a width of 1: the linear layer still needs a feature axis
            atoms.append(Atom(1, False))
            base = self.reshape(base, tuple(a.size for a in atoms))
        axes = tuple((renamed[a],) if a in renamed else a for a in layout.axes)
        return replace(layout, base=base, atoms=tuple(atoms), axes=axes)

    def rebase(self, layout: ExpertLayout, atoms: tuple[Atom, ...]) -> ExpertLayout:
        """The same elements, with the axes of `base` regrouped to `atoms`."""
        sizes = tuple(a.size for a in atoms)
        if layout.param:
            target = TensorType(layout.base.dtype, sizes)
            base = layout.base
            if target != base.type:
                view = Value(base.name, target)
                self.derive(view, base)
                base = view
            return replace(layout, base=base, atoms=atoms)
        return replace(layout, base=self.reshape(layout.base, sizes), atoms=atoms)

    def derive(self, view: Value, base: Value) -> None:
        recipe = self.recipe(base)
        self.memo[(view,)] = view
        self.stacks[view] = lambda emit: emit.reshape(recipe(emit), view.shape)

    def recipe(self, base: Value) -> Recipe:
        return self.stacks.get(base) or (lambda emit: emit.old(base))

    def matrix(self, weight: ExpertLayout, columns: Sequence[Atom], inner: Axis) -> Value:
        """The weight [N, K] of one expert, as a param of the body."""
        sizes = (product(tuple(a.size for a in columns)), product(tuple(a.size for a in inner)))
        return self.one(weight, (*columns, *inner), sizes)

    def slice_of(
        self, weight: ExpertLayout, axes: Sequence[Axis], wide: Sequence[int], have: Sequence[int]
    ) -> Value:
        """One expert's slice of a stack, as an operand of an element-wise op."""
        atoms = tuple(a for axis in axes for a in axis)
        sizes: list[Dim] = []
        for dim in wide:
            if dim in have:
                sizes.append(size_of(axes[have.index(dim)]))
            elif sizes:
                sizes.append(1)
        return self.one(weight, atoms, tuple(sizes))

    def one(self, weight: ExpertLayout, order: Sequence[Atom], sizes: tuple[Dim, ...]) -> Value:
        """A param of the body whose stack is `weight` with its axes in `order`, reshaped to [E,
        *sizes]."""
        dims = tuple(weight.atoms.index(a) for a in order)
        key = (weight.base, dims, sizes)
        if key in self.memo:
            return self.memo[key]
        recipe = self.recipe(weight.base)
        head = () if weight.expert is None else (weight.atoms.index(weight.expert),)
        units = tuple(i for i, a in enumerate(weight.atoms) if i not in dims and i not in head)
        if any(weight.atoms[i].size != 1 for i in units):
            raise NoMatch(f"{weight.base.name} has an axis that the product does not use")
        experts = self.experts

        def make(emit: RegionEmitter) -> Value:
            value = emit.permute(recipe(emit), (*head, *dims, *units))
            if head or self.alone:
                return emit.reshape(value, (*([cast(int, experts)] if head else []), *sizes))
            value = emit.reshape(value, (1, *sizes))
            target = TensorType(value.dtype, (cast(int, experts), *sizes))
            return emit("aten.expand.default", [value], [target], attrs={"size": target.shape})[0]

        param = Value(self.fresh(f"p{len(self.memo)}"), TensorType(weight.base.dtype, sizes))
        self.memo[key] = param
        self.picks[param] = Pick(weight.base, dims, sizes)
        self.stacks[param] = make
        self.leaves.append(param)
        return param

    def inline(
        self, source: ExpertLayout, body: Graph, stacks: Sequence[Recipe], axes: tuple[Axis, ...]
    ) -> ExpertLayout:
        """Copies a body that was read separately into this one. `axes` contains one feature
        axis."""
        plain = self.ordered(source, [source.axes[-1]], last=True)
        new = {body.inputs[0]: plain.base}
        for param, stack in zip(body.params, stacks, strict=True):
            copy = Value(self.fresh(f"p{len(self.leaves)}"), param.type)
            self.stacks[copy] = stack
            self.leaves.append(copy)
            new[param] = copy
        for op in body.ops:
            outputs = self.add(
                op.name,
                [new.get(v, v) for v in op.inputs],
                [v.type for v in op.outputs],
                op.attrs,
                op.outputs[0].name,
            )
            new |= dict(zip(op.outputs, outputs, strict=True))
        base = new[body.outputs[0]]
        atoms = tuple(a for axis in axes for a in axis if not a.rows)
        return replace(plain, base=base, atoms=atoms, axes=axes, applied=True)

    def body(self, result: ExpertLayout, x: Value) -> tuple[Graph, tuple[Recipe, ...]]:
        """The body that maps the rows `x` to `result`, and a recipe for the stack of each of its
        params."""
        plain = self.in_order(result)
        needed = {plain.base}
        ops: list[Op] = []
        for op in reversed(self.ops):
            if needed & set(op.outputs):
                ops.append(op)
                needed |= set(op.inputs)
        params = tuple(p for p in self.leaves if p in needed)
        graph = Graph((x,), params, tuple(reversed(ops)), (plain.base,), name="body")
        return graph, tuple(self.stacks[p] for p in params)
