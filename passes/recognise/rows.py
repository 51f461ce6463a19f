"""Reading a region as the work of one expert on its rows.

`Reader.read(value)` answers with the value's `Layout`: which body value it is, and how its axes
hold rows and features. Values that are neither rows nor expert weights (masks, routing weights,
sort orders) are None: opaque. Reading writes the body as it goes. Nothing here decides whether
the block is one: the proof does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from moec.aten import overload
from moec.errors import NoMatch
from moec.ir import Attr, Graph, Op, TensorType, Value
from moec.passes.recognise import copies, elementwise, picking, products
from moec.passes.recognise.block import Recipe
from moec.passes.recognise.body import ROWS
from moec.passes.recognise.layout import (
    Atom,
    Axis,
    Layout,
    fused,
    only_features,
    only_rows,
    regroup,
    size_of,
)
from moec.passes.recognise.opnames import ACROSS, PICKS, PRODUCTS, REARRANGE, ZEROS
from moec.passes.recognise.region import CASTS, Emitter, Scope
from moec.sizes import Dim, product

if TYPE_CHECKING:
    from moec.passes.recognise.fans import Fan


@dataclass(frozen=True)
class Pick:
    """A body's param: the axes `places` of a weight, in this order, grouped to `sizes`."""

    base: Value
    places: tuple[int, ...]
    sizes: tuple[Dim, ...]


@dataclass
class Reader:
    """Reads one block. `alone`: weights are one expert's own, not stacks over experts. `only`
    limits the reading to some ops, so that what they read is tokens or opaque.
    """

    scope: Scope
    alone: bool = False
    only: frozenset[Op] | None = None
    experts: int | None = None
    x: Value | None = None
    memo: dict[Value, Layout] = field(default_factory=dict)
    opaque_values: set[Value] = field(default_factory=set)
    why: dict[Value, str] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    stacks: dict[Value, Recipe] = field(default_factory=dict)
    leaves: list[Value] = field(default_factory=list)
    uses: dict[str, list[Value]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    known: dict[tuple[object, ...], Value] = field(default_factory=dict)
    picks: dict[Value, Pick] = field(default_factory=dict)
    fans: Callable[[Op], Fan | None] = lambda op: None
    input_side: bool = False

    def read(self, value: Value) -> Layout | None:
        """The layout of `value`, or None where it is opaque; `why` then knows the reason."""
        found = self.memo.get(value)
        if found is not None or value in self.opaque_values:
            return found
        if value in self.scope.constants:
            self.memo[value] = self.weight(value)
            return self.memo[value]
        op = self.scope.maker(value)
        if op is None or not self.within(op):
            return None
        self.opaque_values.update(op.outputs)  # while they are being read, and if it fails
        try:
            layouts = self.apply(op)
        except NoMatch as why:
            self.why[value] = str(why)
            return None
        self.keep(op, layouts)
        return self.memo.get(value)

    def keep(self, op: Op, layouts: Sequence[Layout | None]) -> None:
        for output, layout in zip(op.outputs, layouts, strict=True):
            if layout is None:
                self.opaque_values.add(output)
            else:
                self.opaque_values.discard(output)
                self.memo[output] = layout

    def within(self, op: Op) -> bool:
        """Whether the op may belong to the block: it follows the tokens, or picks weights."""
        if self.only is not None:
            return op in self.only
        if self.x is None:
            source = op.inputs[0] if op.inputs else None
            while source is not None and source not in self.scope.constants:
                maker = self.scope.maker(source)
                picks = maker is not None and maker.name in (*REARRANGE, *PICKS)
                source = maker.inputs[0] if maker is not None and picks else None
            return source is not None and op.name in (*REARRANGE, *PICKS)
        start = self.scope.maker(self.x)
        return start is None or self.scope.position[op] > self.scope.position[start]

    def weight(self, value: Value) -> Layout:
        """A param, seen through what only rearranges it."""
        op = self.scope.maker(value)
        if op is not None and op.name in REARRANGE:
            source = self.read(op.inputs[0])
            if source is not None:
                try:
                    return self.move(op, source)
                except NoMatch:
                    pass  # then it is a weight of its own
        stacked = not self.alone and len(value.shape) > 1
        if stacked and self.experts is None and len(value.shape) == 3:
            self.experts = cast(int, value.shape[0])
        stacked = stacked and value.shape[0] == self.experts
        atoms = tuple(Atom(size, stacked and axis == 0) for axis, size in enumerate(value.shape))
        axes = tuple((a,) if a.size != 1 or a.rows else () for a in atoms)
        expert = atoms[0] if stacked else None
        return Layout(value, atoms, axes, param=True, expert=expert)

    def tokens(self, value: Value) -> Layout:
        """Rows that no expert has touched, back to the tokens of the block."""
        layout = self.memo.get(value)
        if layout is not None:
            return layout
        op = self.scope.maker(value)
        if op is not None and self.only is None and copies.spreads(self, op):
            which = copies.carrier(self, op)
            self.tokens(op.inputs[which])
            layouts = self.apply(op)
            self.keep(op, layouts)
            found = self.memo.get(value)
            if found is not None:
                return found
        if self.x is not None:
            return self.again(value)
        self.x = value
        if len(value.shape) < 2:
            raise NoMatch(f"{value} holds no rows of features")
        axes = [(Atom(d, True),) if d != 1 else () for d in value.shape[:-1]]
        feature = Atom(value.shape[-1], False)
        base = Value("x", TensorType(value.dtype, (ROWS, value.shape[-1])))
        self.memo[value] = Layout(base, (feature,), (*axes, (feature,)))
        self.opaque_values.clear()  # what was read before the tokens were known
        return self.memo[value]

    @property
    def root(self) -> Value:
        """The tokens before any reshape: the region's cut."""
        assert self.x is not None
        return self.scope.behind(self.x)

    def again(self, value: Value) -> Layout:
        """The tokens in another shape."""
        assert self.x is not None
        if self.scope.behind(value) is not self.root:
            raise NoMatch(f"experts read both {self.x.name} and {value.name}")
        axes, splits = regroup(self.memo[self.x].axes, value.shape)
        if splits and any(not atom.rows for atom in splits):
            raise NoMatch(f"{value.name} cuts the features of {self.x.name}")
        self.memo[value] = replace(self.memo[self.x], axes=axes)
        return self.memo[value]

    def is_zeros(self, value: Value) -> bool:
        op = self.scope.made_by(value, *ZEROS)
        return op is not None and op.attrs.get("fill_value", 0) in (0, 0.0, False)

    def use(self, role: str, value: Value) -> None:
        found = self.uses.setdefault(role, [])
        if value not in found:
            found.append(value)

    def apply(self, op: Op) -> Sequence[Layout | None]:
        """The layouts of the op's outputs."""
        name = op.name
        if name in PRODUCTS:
            return [products.product(self, op)]
        if name == "aten.index_put.default":
            return [picking.put(self, op)]
        if name == "aten.cat.default":
            fan = self.fans(op)
            return [elementwise.cat(self, op) if fan is None else self.fan(op, fan)]
        if not op.inputs:
            return [None] * len(op.outputs)
        first = self.read(op.inputs[0])
        if name in REARRANGE or name == "aten.repeat.default":
            return [None if first is None else self.move(op, first)]
        if name in PICKS:
            return [None if first is None else picking.index(self, op, first)]
        if name == "nn.rms_norm":
            return [None if first is None else elementwise.norm(self, op, first)]
        if name == "aten.gather.default":
            return [None if first is None else picking.gather(self, op, first)]
        if name in ("aten.slice.Tensor", "aten.select.int", "aten.split_with_sizes.default"):
            return picking.part(self, op, first)
        if name in ACROSS:
            return [None if first is None else elementwise.across(self, op, first)]
        if name in CASTS or (
            name.startswith("aten.") and torch.Tag.pointwise in overload(name).tags
        ):
            return [elementwise.pointwise(self, op)]
        layouts = [self.read(v) for v in op.inputs]
        if any(layout is not None and not layout.param for layout in layouts):
            raise NoMatch(f"rows go through {name}, which is no work of one expert")
        return [None] * len(op.outputs)

    def fan(self, op: Op, fan: Fan) -> Layout:
        """Every expert's branch over the same rows, or over the rows split by expert."""
        if self.experts not in (None, fan.experts):
            raise NoMatch(f"it has {self.experts} experts, and then {fan.experts}")
        self.experts = fan.experts
        source = self.tokens(fan.x)
        for role, values in fan.uses.items():
            for value in values:
                self.use(role, value)
        axes = list(fan.axes)
        if fan.split is None:
            dim = cast(int, op.attrs.get("dim", 0)) % len(op.outputs[0].shape)
            axes[dim] = (Atom(fan.experts, True), *axes[dim])
        else:
            self.use("split", fan.split.outputs[0])
            axes[:1] = [source.axes[0]]
        return self.inline(source, fan.body, fan.stacks, tuple(axes))

    def move(self, op: Op, source: Layout) -> Layout:
        """Reshape, permute, expand, repeat."""
        shape = op.outputs[0].shape
        if op.name == "aten.permute.default":
            dims = cast("tuple[int, ...]", op.attrs["dims"])
            return replace(source, axes=tuple(source.axes[d] for d in dims))
        if op.name in ("aten.expand.default", "aten.repeat.default"):
            added = len(shape) - len(source.axes)
            axes: list[Axis] = []
            for place, dim in enumerate(shape):
                axis = source.axes[place - added] if place >= added else ()
                if size_of(axis) != dim:
                    times = dim if not axis else cast("tuple[Dim, ...]", op.attrs["repeats"])[place]
                    if not only_rows(axis):
                        raise NoMatch(f"{op.name} repeats a feature axis")
                    axis = (Atom(times, True), *axis)
                axes.append(axis)
            return replace(source, axes=tuple(axes))
        grouped, splits = regroup(source.axes, shape)
        moved = replace(source, axes=grouped)
        for whole, parts in splits.items():
            moved = self.split(moved, whole, parts)
        return moved

    def split(self, layout: Layout, whole: Atom, parts: tuple[Atom, ...]) -> Layout:
        if whole not in layout.atoms:
            return layout  # rows
        if whole is layout.expert:
            raise NoMatch("a reshape cuts the expert axis of a stack")
        atoms = tuple(p for a in layout.atoms for p in (parts if a is whole else (a,)))
        return self.rebase(layout, atoms)

    def rebase(self, layout: Layout, atoms: tuple[Atom, ...]) -> Layout:
        """The same elements with another grouping of the base's axes."""
        sizes = tuple(a.size for a in atoms)
        if layout.param:
            wanted = TensorType(layout.base.dtype, sizes)
            base = layout.base
            if wanted != base.type:
                view = Value(base.name, wanted)
                self.derive(view, base)
                base = view
            return replace(layout, base=base, atoms=atoms)
        return replace(layout, base=self.reshape(layout.base, sizes), atoms=atoms)

    def derive(self, view: Value, base: Value) -> None:
        recipe = self.recipe(base)
        self.known[(view,)] = view
        self.stacks[view] = lambda emit: emit.reshape(recipe(emit), view.shape)

    def recipe(self, base: Value) -> Recipe:
        return self.stacks.get(base) or (lambda emit: emit.old(base))

    def opaque(self, op: Op, layouts: Sequence[Layout | None]) -> str:
        parts = [v for v, la in zip(op.inputs, layouts, strict=True) if la is None]
        return ", ".join(v.name + (f" ({self.why[v]})" if v in self.why else "") for v in parts)

    def in_order(self, layout: Layout, param_units: bool = True) -> Layout:
        """One atom per feature axis, the base's axes in the order of the value's."""
        return self.ordered(layout, [a for a in layout.axes if a and only_features(a)])

    def ordered(self, layout: Layout, fuse: Sequence[Axis], last: bool = False) -> Layout:
        """The base with its axes in the order of the value's, those of `fuse` in one piece each.

        With `last`, the one axis of `fuse` stands last in the base.
        """
        if layout.param:
            return layout
        wanted = list(layout.features)
        if last:
            tail = [a for a in wanted if a in fuse[0]]
            wanted = [a for a in wanted if a not in tail] + tail
        base = layout.base
        if tuple(wanted) != layout.atoms:
            dims = (0, *(layout.atoms.index(a) + 1 for a in wanted))
            type = TensorType(base.dtype, tuple(base.shape[d] for d in dims))
            (base,) = self.add("aten.permute.default", [base], [type], {"dims": dims}, base.name)
        atoms: list[Atom] = []
        renamed: dict[Axis, Atom] = {}
        position = 0
        while position < len(wanted):
            axis = next((f for f in fuse if f and f[0] is wanted[position]), None)
            if axis is not None and len(axis) > 1:
                renamed[axis] = fused(axis)
                atoms.append(renamed[axis])
                position += len(axis)
            else:
                atoms.append(wanted[position])
                position += 1
        base = self.reshape(base, tuple(a.size for a in atoms))
        if last and not fuse[0]:  # a width of one: the linear layer needs its axis
            atoms.append(Atom(1, False))
            base = self.reshape(base, tuple(a.size for a in atoms))
        axes = tuple((renamed[a],) if a in renamed else a for a in layout.axes)
        return replace(layout, base=base, atoms=tuple(atoms), axes=axes)

    def reshape(self, base: Value, features: Sequence[Dim]) -> Value:
        wanted = TensorType(base.dtype, (ROWS, *features))
        if wanted == base.type:
            return base
        attrs: dict[str, Attr] = {"shape": wanted.shape}
        return self.add("aten.reshape.default", [base], [wanted], attrs, base.name)[0]

    def matrix(self, weight: Layout, columns: Sequence[Atom], inner: Axis) -> Value:
        """One expert's [N, K] of a stack."""
        sizes = (
            product(tuple(a.size for a in columns)),
            product(tuple(a.size for a in inner)),
        )
        return self.one(weight, (*columns, *inner), sizes)

    def slice_of(
        self, weight: Layout, axes: Sequence[Axis], wide: Sequence[int], have: Sequence[int]
    ) -> Value:
        """One expert's slice of a stack, for an element-wise op."""
        atoms = tuple(a for axis in axes for a in axis)
        sizes: list[Dim] = []
        for place in wide:
            if place in have:
                sizes.append(size_of(axes[have.index(place)]))
            elif sizes:
                sizes.append(1)
        return self.one(weight, atoms, tuple(sizes))

    def one(self, weight: Layout, order: Sequence[Atom], sizes: tuple[Dim, ...]) -> Value:
        """The body's param for a stack whose axes are put in this order and grouped so."""
        places = tuple(weight.atoms.index(a) for a in order)
        key = (weight.base, places, sizes)
        if key in self.known:
            return self.known[key]
        recipe = self.recipe(weight.base)
        head = () if weight.expert is None else (weight.atoms.index(weight.expert),)
        units = tuple(i for i, a in enumerate(weight.atoms) if i not in places and i not in head)
        if any(weight.atoms[i].size != 1 for i in units):
            raise NoMatch(f"{weight.base.name} has an axis that the product does not use")
        experts = self.experts

        def make(emit: Emitter) -> Value:
            value = emit.permute(recipe(emit), (*head, *places, *units))
            if head or self.alone:
                return emit.reshape(value, (*([cast(int, experts)] if head else []), *sizes))
            value = emit.reshape(value, (1, *sizes))
            wanted = TensorType(value.dtype, (cast(int, experts), *sizes))
            return emit("aten.expand.default", [value], [wanted], attrs={"size": wanted.shape})[0]

        param = Value(self.fresh(f"p{len(self.known)}"), TensorType(weight.base.dtype, sizes))
        self.known[key] = param
        self.picks[param] = Pick(weight.base, places, sizes)
        self.stacks[param] = make
        self.leaves.append(param)
        return param

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

    def fresh(self, name: str) -> str:
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        return name if not count else f"{name}_{count + 1}"

    def inline(
        self,
        source: Layout,
        body: Graph,
        stacks: Sequence[Recipe],
        axes: tuple[Axis, ...],
    ) -> Layout:
        """The rows after a body that was read on its own; `axes` hold one feature axis."""
        plain = self.ordered(source, [source.axes[-1]], last=True)
        new = {body.inputs[0]: plain.base}
        for param, stack in zip(body.params, stacks, strict=True):
            mine = Value(self.fresh(f"p{len(self.leaves)}"), param.type)
            self.stacks[mine] = stack
            self.leaves.append(mine)
            new[param] = mine
        for op in body.ops:
            made = self.add(
                op.name,
                [new.get(v, v) for v in op.inputs],
                [v.type for v in op.outputs],
                op.attrs,
                op.outputs[0].name,
            )
            new |= dict(zip(op.outputs, made, strict=True))
        base = new[body.outputs[0]]
        atoms = tuple(a for axis in axes for a in axis if not a.rows)
        return replace(plain, base=base, atoms=atoms, axes=axes, applied=True)

    def body(self, result: Layout) -> tuple[Graph, tuple[Recipe, ...]]:
        """The body whose result is `result`, and how each of its params is stacked."""
        plain = self.in_order(result)
        x = self.memo[cast(Value, self.x)]
        needed = {plain.base}
        ops: list[Op] = []
        for op in reversed(self.ops):
            if needed & set(op.outputs):
                ops.append(op)
                needed |= set(op.inputs)
        params = tuple(p for p in self.leaves if p in needed)
        graph = Graph((x.base,), params, tuple(reversed(ops)), (plain.base,), name="body")
        return graph, tuple(self.stacks[p] for p in params)
