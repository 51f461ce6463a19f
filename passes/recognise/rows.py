"""Reading a region as the work of one expert on its rows.

`Reader.read(value)` answers with the value's `Layout`: which body value it is, and how its axes
hold rows and features. Values that are neither rows nor expert weights (masks, routing weights,
sort orders) are None: opaque. Reading writes the body as it goes. Nothing here decides whether
the block is one: the proof does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from moec.aten import overload
from moec.errors import NoMatch
from moec.ir import Attr, DType, Graph, Op, Ref, TensorType, Value
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
from moec.passes.recognise.region import CASTS, VIEWS, Emitter, Scope, chooses
from moec.sizes import Dim, product

if TYPE_CHECKING:
    from moec.passes.recognise.fans import Fan

PRODUCTS = {
    "aten.bmm.default",
    "aten.mm.default",
    "aten.matmul.default",
    "aten.linear.default",
    "aten.addmm.default",
    "aten.baddbmm.default",
    "aten._grouped_mm.default",
    "transformers.grouped_mm_fallback.default",
}
_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}
_MULTIPLY = {"aten.mul.Tensor", "aten.div.Tensor"}
_SPREAD = {
    "aten.expand.default",
    "aten.repeat.default",
    "aten.index.Tensor",
    "aten.index_select.default",
    "aten.index_put.default",
    "aten.gather.default",
    "aten.bmm.default",
    "aten.mm.default",
    "aten.matmul.default",
}
"""What may lie between a token and its routed copies, and is then part of the block."""
_REARRANGE = VIEWS | {"aten.permute.default", "aten.expand.default"}
_PICKS = {"aten.index.Tensor", "aten.index_select.default", "aten.embedding.default"}
_ZEROS = {
    "aten.full.default",
    "aten.full_like.default",
    "aten.zeros_like.default",
    "aten.zeros.default",
}
_ACROSS = {
    "aten.mean.dim",
    "aten.sum.dim_IntList",
    "aten.amax.default",
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.var.correction",
    "aten.linalg_vector_norm.default",
}


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

    # ---- values --------------------------------------------------------------------------

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
                picks = maker is not None and maker.name in (*_REARRANGE, *_PICKS)
                source = maker.inputs[0] if maker is not None and picks else None
            return source is not None and op.name in (*_REARRANGE, *_PICKS)
        start = self.scope.maker(self.x)
        return start is None or self.scope.position[op] > self.scope.position[start]

    def weight(self, value: Value) -> Layout | None:
        """A param, seen through what only rearranges it."""
        op = self.scope.maker(value)
        if op is not None and op.name in _REARRANGE:
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
        if op is not None and self.only is None and self.spreads(op):
            which = self.carrier(op)
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

    def spreads(self, op: Op) -> bool:
        """Whether the op's result is made of the tokens' copies rather than the tokens."""
        if op.name in _REARRANGE or op.name in CASTS:
            return self.only_moves(op)
        if op.name in _MULTIPLY and len(op.inputs) == 2:
            return any(v.shape[-1:] == (1,) and chooses(self.scope, v) for v in op.inputs)
        if op.name in PRODUCTS:
            return len(op.inputs) == 2 and chooses(self.scope, op.inputs[0])
        if op.name == "aten.index_put.default":
            return self.is_zeros(op.inputs[0])
        return op.name in _SPREAD

    def only_moves(self, op: Op) -> bool:
        """Whether copies, or [T, D] itself, lie behind what is seen here in other axes."""
        value = op.outputs[0]
        flat = len(value.shape) == 2 and op.name not in CASTS
        maker: Op | None = op
        while maker is not None and (maker.name in _REARRANGE or maker.name in CASTS):
            source = maker.inputs[0]
            if product(maker.outputs[0].shape) != product(source.shape):
                return True
            if len(source.shape) == 2 and not flat and source.shape[-1] in value.shape:
                return True
            maker = self.scope.maker(source)
        return maker is not None and self.spreads(maker)

    def carrier(self, op: Op) -> int:
        """Which input holds the tokens."""
        if op.name in _MULTIPLY:
            return 0 if op.inputs[1].shape[-1:] == (1,) and chooses(self.scope, op.inputs[1]) else 1
        if op.name in PRODUCTS:
            return 1
        return len(op.inputs) - 1 if op.name == "aten.index_put.default" else 0

    def is_zeros(self, value: Value) -> bool:
        op = self.scope.made_by(value, *_ZEROS)
        return op is not None and op.attrs.get("fill_value", 0) in (0, 0.0, False)

    def use(self, role: str, value: Value) -> None:
        found = self.uses.setdefault(role, [])
        if value not in found:
            found.append(value)

    # ---- ops -----------------------------------------------------------------------------

    def apply(self, op: Op) -> Sequence[Layout | None]:
        """The layouts of the op's outputs."""
        name = op.name
        if name in PRODUCTS:
            return [self.product(op)]
        if name == "aten.index_put.default":
            return [self.put(op)]
        if name == "aten.cat.default":
            fan = self.fans(op)
            return [self.cat(op) if fan is None else self.fan(op, fan)]
        if not op.inputs:
            return [None] * len(op.outputs)
        first = self.read(op.inputs[0])
        if name in _REARRANGE or name == "aten.repeat.default":
            return [None if first is None else self.move(op, first)]
        if name in _PICKS:
            return [None if first is None else self.index(op, first)]
        if name == "nn.rms_norm":
            return [None if first is None else self.norm(op, first)]
        if name == "aten.gather.default":
            return [None if first is None else self.gather(op, first)]
        if name in ("aten.slice.Tensor", "aten.select.int", "aten.split_with_sizes.default"):
            return self.part(op, first)
        if name in _ACROSS:
            return [None if first is None else self.across(op, first)]
        if name in CASTS or (
            name.startswith("aten.") and torch.Tag.pointwise in overload(name).tags
        ):
            return [self.pointwise(op)]
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

    def index(self, op: Op, source: Layout) -> Layout:
        """Rows, or experts' weights, picked by ids."""
        shape = op.outputs[0].shape
        if op.name == "aten.index.Tensor":
            places = [
                i
                for i, v in enumerate(cast("tuple[Attr, ...]", op.attrs["indices"]))
                if v is not None
            ]
            rank = max(len(v.shape) for v in op.inputs[1:])
        else:
            places = [cast(int, op.attrs.get("dim", 0))]
            rank = len(op.inputs[1].shape)
        if places != list(range(places[0], places[0] + len(places))):
            raise NoMatch("an index picks from axes that are not neighbours")
        axes = source.axes
        picked = axes[places[0] : places[-1] + 1]
        if not all(map(only_rows, picked)):
            raise NoMatch("an index picks features")
        if source.param:
            if source.expert is None or picked != ((source.expert,),):
                return self.pick_constant(op, source)
            self.use("ids", op.inputs[1])
        else:
            for value in op.inputs[1:]:
                self.use("order", value)
        new = tuple((Atom(d, True),) if d != 1 else () for d in shape[places[0] :][:rank])
        return replace(source, axes=(*axes[: places[0]], *new, *axes[places[-1] + 1 :]))

    def pick_constant(self, op: Op, source: Layout) -> Layout:
        raise NoMatch(f"an index picks from {source.base.name}, which is not stacked over experts")

    def gather(self, op: Op, source: Layout) -> Layout:
        dim = cast(int, op.attrs["dim"]) % len(source.axes)
        if source.param or not only_rows(source.axes[dim]):
            raise NoMatch("a gather picks features")
        self.use("order", op.inputs[1])
        size = op.outputs[0].shape[dim]
        axes = list(source.axes)
        axes[dim] = (Atom(size, True),) if size != 1 else ()
        return replace(source, axes=tuple(axes))

    def put(self, op: Op) -> Layout | None:
        """Rows written, or added, into zeros."""
        values = op.inputs[-1]
        layout = self.read(values)
        if layout is None or layout.param:
            return None
        if not self.is_zeros(op.inputs[0]):
            raise NoMatch(f"rows are added into {op.inputs[0].name}, which is not zero")
        for index in op.inputs[1:-1]:
            self.use("order", index)
        shape = op.outputs[0].shape
        kept = [axis for axis in layout.axes if axis and only_features(axis)]
        lead = len(shape) - len(kept)
        if lead < 1 or any(not only_rows(a) for a in layout.axes[: len(layout.axes) - len(kept)]):
            raise NoMatch("an index_put writes into features")
        rows = tuple((Atom(d, True),) if d != 1 else () for d in shape[:lead])
        summed = bool(op.attrs.get("accumulate")) and layout.applied
        return replace(layout, axes=(*rows, *kept), reduced=summed)

    def part(self, op: Op, source: Layout | None) -> Sequence[Layout | None]:
        """Slice, select and split along a feature axis."""
        if source is None:
            return [None] * len(op.outputs)
        if len(op.outputs) == 1 and op.outputs[0].shape == op.inputs[0].shape:
            return [source]
        dim = cast(int, op.attrs.get("dim", 0)) % len(source.axes)
        axis = source.axes[dim]
        if not axis or not only_features(axis):
            what = "an expert's slice" if source.param else "rows"
            raise NoMatch(f"{op.name} cuts {what} out of a stack")
        if source.param:
            if op.outputs[0] in self.scope.constants:
                return [self.own(v, source, dim) for v in op.outputs]
            raise NoMatch(f"{op.name} cuts weights that an index has picked")
        plain = self.ordered(source, [axis])
        place = plain.atoms.index(plain.axes[dim][0]) + 1
        attrs = {**op.attrs, "dim": place}
        results = []
        types = []
        for value in op.outputs:
            atoms = list(plain.atoms)
            axes = list(plain.axes)
            if op.name == "aten.select.int":
                del atoms[place - 1], axes[dim]
            else:
                atoms[place - 1] = Atom(value.shape[dim], False)
                axes[dim] = (atoms[place - 1],)
            types.append(TensorType(value.dtype, (ROWS, *(a.size for a in atoms))))
            results.append((tuple(atoms), tuple(axes)))
        made = self.add(op.name, [plain.base], types, attrs, op.outputs[0].name)
        return [
            replace(plain, base=base, atoms=atoms, axes=axes)
            for base, (atoms, axes) in zip(made, results, strict=True)
        ]

    def own(self, value: Value, source: Layout, dim: int) -> Layout:
        """A slice of constant weights is a weight of its own, with the expert where it was."""
        atoms = tuple(
            a[0]
            if len(a) == 1 and i != dim
            else Atom(size_of(a) if i != dim else d, only_rows(a) and bool(a))
            for i, (a, d) in enumerate(zip(source.axes, value.shape, strict=True))
        )
        expert = next((a for a in atoms if a.rows), None)
        return Layout(value, atoms, tuple((a,) if a.size != 1 else () for a in atoms), True, expert)

    def across(self, op: Op, source: Layout) -> Layout | None:
        """Sums, means and softmax: over features in the body, over rows as part of combine."""
        if source.param:
            return None
        given = op.attrs.get("dim")
        rank = len(source.axes)
        dims = given if isinstance(given, tuple) else (given,)
        if given is None or not dims:
            raise NoMatch(f"{op.name} goes over all axes")
        places = sorted(cast(int, d) % rank for d in dims)
        picked = [source.axes[p] for p in places]
        keep = bool(op.attrs.get("keepdim")) or "softmax" in op.name
        softmax = "softmax" in op.name
        if all(map(only_rows, picked)) and any(picked):
            if op.name != "aten.sum.dim_IntList":
                raise NoMatch(f"{op.name} goes over rows")
            axes = [
                () if i in places else axis
                for i, axis in enumerate(source.axes)
                if keep or i not in places
            ]
            return replace(source, axes=tuple(axes), reduced=True)
        if not all(a and only_features(a) for a in picked):
            raise NoMatch(f"{op.name} goes over rows and features at once")
        plain = self.ordered(source, picked)
        gone = [plain.axes[p][0] for p in places]
        at = tuple(plain.atoms.index(a) + 1 for a in gone)
        atoms = plain.atoms if softmax else tuple(a for a in plain.atoms if a not in gone)
        kept = [
            (() if i in places and not softmax else axis)
            for i, axis in enumerate(plain.axes)
            if keep or i not in places
        ]
        attrs: dict[str, Attr] = {k: v for k, v in op.attrs.items() if k != "keepdim"}
        attrs["dim"] = at if isinstance(given, tuple) else at[0]
        types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
        (base,) = self.add(op.name, [plain.base], types, attrs, op.outputs[0].name)
        return replace(plain, base=base, atoms=atoms, axes=tuple(kept))

    def norm(self, op: Op, source: Layout) -> Layout | None:
        """nn.rms_norm over the last axis, in element-wise ops: its gain is an expert's own."""
        if source.param:
            return None
        if not source.axes[-1] or not only_features(source.axes[-1]):
            raise NoMatch("a norm goes over rows")
        plain = self.ordered(source, [source.axes[-1]], last=True)
        shape, dtype = plain.base.shape, op.outputs[0].dtype
        full, narrow = TensorType("f32", shape), TensorType("f32", (*shape[:-1], 1))

        def step(name: str, inputs: Sequence[Value], type: TensorType, **attrs: Attr) -> Value:
            return self.add(name, inputs, [type], attrs, op.outputs[0].name)[0]

        def as_dtype(value: Value, to: str) -> Value:
            wanted = TensorType(to, value.shape)
            same = value.dtype == to
            return (
                value if same else step("aten._to_copy.default", [value], wanted, dtype=DType(to))
            )

        x = as_dtype(plain.base, "f32")
        square = step("aten.mul.Tensor", [x, x], full)
        mean = step("aten.mean.dim", [square], narrow, dim=(len(shape) - 1,), keepdim=True)
        shifted = step("aten.add.Tensor", [mean], narrow, other=op.attrs["epsilon"])
        scale = step("aten.rsqrt.default", [shifted], narrow)
        y = step("aten.mul.Tensor", [x, scale], full)
        gain = self.read(op.inputs[1]) if len(op.inputs) > 1 else None
        if len(op.inputs) > 1 and (gain is None or not gain.param):
            raise NoMatch(f"{op.inputs[1].name} scales a norm and is no weight")
        if op.attrs.get("round_first"):
            y = as_dtype(y, dtype)
        if gain is not None:
            weight = self.slice_of(gain, [gain.axes[-1]], [0], [0])
            weight = weight if op.attrs.get("round_first") else as_dtype(weight, "f32")
            y = step("aten.mul.Tensor", [y, weight], TensorType(y.dtype, shape))
        return replace(plain, base=as_dtype(y, dtype), applied=source.applied or gain is not None)

    def cat(self, op: Op) -> Layout | None:
        layouts = [self.read(v) for v in op.inputs]
        rows = [la for la in layouts if la is not None and not la.param]
        if not rows:
            return None
        if len(rows) < len(layouts):
            raise NoMatch("rows are concatenated with something else")
        dim = cast(int, op.attrs.get("dim", 0)) % len(rows[0].axes)
        if not all(la.axes[dim] and only_features(la.axes[dim]) for la in rows):
            raise NoMatch("rows of several kinds are concatenated")
        ready = [self.in_order(la) for la in rows]
        atom = Atom(op.outputs[0].shape[dim], False)
        place = ready[0].features.index(ready[0].axes[dim][0])
        atoms = tuple(atom if i == place else a for i, a in enumerate(ready[0].atoms))
        axes = tuple((atom,) if i == dim else a for i, a in enumerate(ready[0].axes))
        types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
        attrs: dict[str, Attr] = {
            "tensors": tuple(Ref(i) for i in range(len(ready))),
            "dim": place + 1,
        }
        (base,) = self.add(op.name, [la.base for la in ready], types, attrs, op.outputs[0].name)
        return replace(ready[0], base=base, atoms=atoms, axes=axes)

    def pointwise(self, op: Op) -> Layout | None:
        layouts = [self.read(v) for v in op.inputs]
        rows = [la for la in layouts if la is not None and not la.param]
        if not rows:
            return None
        shape = op.outputs[0].shape
        if any(la is None for la in layouts):
            return self.weighting(op, layouts, rows)
        if len(layouts) == 1:
            source = rows[0]
            types = [TensorType(op.outputs[0].dtype, source.base.shape)]
            (base,) = self.add(op.name, [source.base], types, op.attrs, op.outputs[0].name)
            return replace(source, base=base)
        if any(la.reduced for la in rows):
            raise NoMatch(f"{op.name} joins summed rows with something else")
        return self.together(op.name, op.attrs, [cast(Layout, la) for la in layouts], shape, op)

    def together(
        self, name: str, attrs: object, layouts: Sequence[Layout], shape: Sequence[Dim], op: Op
    ) -> Layout:
        """An element-wise op on rows and weights, broadcast to `shape`."""
        rank = len(shape)
        padded = [((),) * (rank - len(la.axes)) + la.axes for la in layouts]
        axes: list[Axis] = []
        for place in range(rank):
            here = [p[place] for p in padded if p[place]]
            features = [a for a in here if not only_rows(a)]
            if any(not only_features(a) for a in features):
                raise NoMatch("an axis mixes rows and features")
            if features and len(features) < len(here):
                raise NoMatch("rows are broadcast against features")
            chosen = features or here
            axes.append((fused(chosen[0]),) if features else chosen[0] if here else ())
        wide = [place for place in range(rank) if axes[place] and not only_rows(axes[place])]
        inputs = []
        for layout, mine in zip(layouts, padded, strict=True):
            plain = self.in_order(replace(layout, axes=mine), param_units=False)
            have = [place for place in wide if mine[place]]
            if layout.param:
                inputs.append(self.slice_of(plain, [mine[p] for p in have], wide, have))
            else:
                sizes = [size_of(mine[p]) if p in have else 1 for p in wide]
                inputs.append(self.reshape(plain.base, sizes))
        atoms = tuple(axes[p][0] for p in wide)
        types = [TensorType(op.outputs[0].dtype, (ROWS, *(a.size for a in atoms)))]
        (base,) = self.add(name, inputs, types, dict(attrs), op.outputs[0].name)  # type: ignore[call-overload]
        first = next(la for la in layouts if not la.param)
        return Layout(
            base,
            atoms,
            tuple(axes),
            weighted=any(la.weighted for la in layouts),
            applied=any(la.applied or la.param for la in layouts),
            reduced=first.reduced,
        )

    def weighting(self, op: Op, layouts: Sequence[Layout | None], rows: Sequence[Layout]) -> Layout:
        """Rows times routing weights, or rows where a mask is set."""
        if len(rows) != 1 or any(la is not None and la.param for la in layouts):
            raise NoMatch(f"{op.name} joins rows with {self.opaque(op, layouts)}")
        source = rows[0]
        others = [v for v, la in zip(op.inputs, layouts, strict=True) if la is None]
        rank = len(op.outputs[0].shape)
        padded = ((),) * (rank - len(source.axes)) + source.axes
        if op.name == "aten.where.self" and len(others) == 2 and self.is_zeros(others[1]):
            others = others[:1]
        elif op.name not in (*_MULTIPLY, "aten.masked_fill.Scalar") or len(others) != 1:
            raise NoMatch(f"{op.name} joins rows with {self.opaque(op, layouts)}")
        axes = list(padded)
        for place, (mine, size) in enumerate(zip(padded, op.outputs[0].shape, strict=True)):
            shift = len(others[0].shape) - rank
            theirs = others[0].shape[place + shift] if place + shift >= 0 else 1
            if theirs == 1:
                continue
            if mine and not only_rows(mine):
                raise NoMatch(f"{others[0].name} weighs features, not rows")
            if not mine:
                axes[place] = (Atom(size, True),)
        masks = op.name == "aten.where.self" or op.name == "aten.masked_fill.Scalar"
        self.use("mask" if masks else "weights", others[0])
        if not masks and not source.applied:
            self.input_side = True
        return replace(source, axes=tuple(axes), weighted=source.weighted or not masks)

    def opaque(self, op: Op, layouts: Sequence[Layout | None]) -> str:
        parts = [v for v, la in zip(op.inputs, layouts, strict=True) if la is None]
        return ", ".join(v.name + (f" ({self.why[v]})" if v in self.why else "") for v in parts)

    # ---- products ------------------------------------------------------------------------

    def product(self, op: Op) -> Layout | None:
        name = op.name
        bias: Value | None = None
        left, right = op.inputs[0], op.inputs[1]
        if name in ("aten.addmm.default", "aten.baddbmm.default"):
            if set(op.attrs) & {"alpha", "beta"}:
                raise NoMatch(f"{name} with factors is not a linear layer")
            bias, left, right = op.inputs[:3]
        elif name == "aten.linear.default" and len(op.inputs) > 2:
            bias = op.inputs[2]
        sides = [self.read(left), self.read(right)]
        stacks = [i for i, side in enumerate(sides) if side is not None and side.param]
        rows = [i for i, side in enumerate(sides) if side is not None and not side.param]
        if len(stacks) == 2 or (not stacks and not rows):
            return None
        if len(rows) == 2:
            raise NoMatch(f"{name} multiplies rows with rows")
        if not stacks:
            return self.mix(op, sides, (left, right))
        which = stacks[0]
        weight = cast(Layout, sides[which])
        if not self.alone and (weight.expert is None or len(weight.atoms) < 3):
            return None  # one matrix for all: not an expert's
        if name in _GROUPED:
            self.use("ends", op.inputs[2])
        source = sides[1 - which] or self.tokens((left, right)[1 - which])
        if source.reduced:
            raise NoMatch("summed rows go through another product")
        made = self.linear(op, source, weight, rows_left=which == 1)
        if bias is None:
            return made
        shift = self.read(bias)
        if shift is None or not shift.param:
            raise NoMatch(f"{bias.name} is added to a product and is no weight")
        base = self.ops[-1] if self.ops else None
        if base is not None and base.outputs[0] is made.base and shift.features == shift.atoms[-1:]:
            only = self.slice_of(shift, [shift.axes[-1]], [0], [0])
            if only.shape == made.base.shape[-1:]:
                self.ops[-1] = replace(base, inputs=(*base.inputs, only))
                return made
        return self.together("aten.add.Tensor", {}, [made, shift], op.outputs[0].shape, op)

    def linear(self, op: Op, source: Layout, weight: Layout, rows_left: bool) -> Layout:
        a, w = source.axes, weight.axes
        turned = op.name == "aten.linear.default"
        if rows_left:
            inner, outer = (w[-1], w[-2]) if turned else (w[-2], w[-1])
            mine, free = a[-1], a[-2] if len(a) > 1 else ()
        else:
            inner, outer = w[-1], w[-2]
            mine, free = a[-2], a[-1]
        if not (only_features(mine) and only_features(inner)):
            raise NoMatch(f"{op.name} sums over {mine or 'nothing'} and {inner or 'nothing'}")
        grouped = op.name in _GROUPED
        columns = tuple(atom for atom in outer if not atom.rows)
        plain = self.ordered(source, [mine], last=True)
        count = product(tuple(atom.size for atom in columns))
        matrix = self.matrix(weight, columns, inner)
        shape = (*plain.base.shape[:-1], count)
        (base,) = self.add(
            "aten.linear.default",
            [plain.base, matrix],
            [TensorType(op.outputs[0].dtype, shape)],
            {},
            op.outputs[0].name,
        )
        rest = tuple(x for x in plain.atoms if x is not plain.atoms[-1])
        result = Atom(count, False)
        new_outer = (
            tuple(
                result if atom is columns[0] else atom
                for atom in outer
                if atom.rows or atom is columns[0]
            )
            if columns
            else outer
        )
        if not columns and count == 1:
            rest_atoms = rest
            base = self.reshape(base, tuple(x.size for x in rest))
        else:
            rest_atoms = (*rest, result)
        if turned or grouped:
            axes = (*a[:-1], new_outer)
        else:
            rank = len(op.outputs[0].shape)
            mine_batch = ((),) * (rank - len(a)) + a[:-2]
            their_batch = ((),) * (rank - len(w)) + w[:-2]
            batch = tuple(p or q for p, q in zip(mine_batch, their_batch, strict=True))
            axes = (*batch, free, new_outer) if rows_left else (*batch, new_outer, free)
        return replace(plain, base=base, atoms=rest_atoms, axes=axes, applied=True)

    def mix(self, op: Op, sides: Sequence[Layout | None], values: Sequence[Value]) -> Layout:
        """Rows gathered by a product with masks or routing weights."""
        which = 0 if sides[0] is not None else 1
        source, other = cast(Layout, sides[which]), values[1 - which]
        if op.name not in ("aten.bmm.default", "aten.mm.default", "aten.matmul.default"):
            raise NoMatch(f"{op.name} multiplies rows with {other.name}")
        summed = source.axes[-1] if which == 0 else source.axes[-2]
        if not summed or not only_rows(summed):
            raise NoMatch(f"{op.name} multiplies features with {other.name}, which is no weight")
        rank = len(op.outputs[0].shape)
        free = other.shape[-1] if which == 0 else other.shape[-2]
        mine = ((),) * (rank - len(source.axes)) + source.axes
        batch = list(mine[:-2])
        for place in range(rank - 2):
            shift = place + len(other.shape) - rank
            if not batch[place] and shift >= 0 and other.shape[shift] != 1:
                batch[place] = (Atom(other.shape[shift], True),)
        new: Axis = (Atom(free, True),) if free != 1 else ()
        axes = (*batch, mine[-2], new) if which == 0 else (*batch, new, mine[-1])
        self.use("mix" if source.applied else "dispatch", other)
        if source.applied:
            return replace(source, axes=axes, reduced=True, weighted=True)
        return replace(source, axes=axes)

    # ---- the body ------------------------------------------------------------------------

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
                return emit.reshape(value, ((experts,) if head else ()) + sizes)  # type: ignore[operator]
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
        attrs: object,
        stem: str,
    ) -> tuple[Value, ...]:
        outputs = tuple(Value(self.fresh(stem), type) for type in types)
        self.ops.append(Op(name, tuple(inputs), outputs, dict(attrs)))  # type: ignore[call-overload]
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
