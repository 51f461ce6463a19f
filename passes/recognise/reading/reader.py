"""What `Reader` has read of a block, and how rows and weights go through moved axes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import CASTS
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.body_writer import BodyWriter, Fan
from moec.passes.recognise.reading.layout import (
    Atom,
    Axis,
    ExpertLayout,
    only_rows,
    regroup,
    size_of,
)
from moec.passes.recognise.reading.opnames import (
    MULTIPLY,
    PICKS,
    PRODUCTS,
    REARRANGE,
    SPREAD,
    ZEROS,
)
from moec.passes.recognise.reading.row_wise import counting, not_row_wise
from moec.passes.recognise.region import Scope, chooses


@dataclass
class BlockReader(ABC):
    """Reads one block. `only` limits the reading to a set of ops; a value that they read from
    outside is tokens or opaque. `writer` holds the body written so far. `addends` maps a result to
    the value that rows were added into, if that is not zero. `shared` maps products that all
    experts share, whose rows are dispatched beside `x`, to their rows in the body. `doubts`
    say why values that weight rows are perhaps no routing weights."""

    scope: Scope
    writer: BodyWriter = field(default_factory=BodyWriter)
    only: frozenset[Op] | None = None
    x: Value | None = None
    memo: dict[Value, ExpertLayout] = field(default_factory=dict)
    opaque_values: set[Value] = field(default_factory=set)
    why: dict[Value, str] = field(default_factory=dict)
    uses: dict[str, list[Value]] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    fans: Callable[[Op], Fan | None] = lambda op: None
    addends: dict[Value, Value] = field(default_factory=dict)
    input_side: bool = False
    shared: dict[Value, Value] = field(default_factory=dict)

    def read(self, value: Value) -> ExpertLayout | None:
        """The layout of `value`, or None if it is opaque; `why` may then hold the reason."""
        layout = self.memo.get(value)
        if layout is not None or value in self.opaque_values:
            return layout
        if value in self.scope.constants:
            self.memo[value] = self.weight(value)
            return self.memo[value]
        op = self.scope.maker(value)
        if op is None or not self.belongs(op):
            return None
        self.opaque_values.update(op.outputs)  # until the read succeeds
        try:
            layouts = self.apply(op)
        except NoMatch as why:
            self.why[value] = str(why)
            return None
        self.keep(op, layouts)
        return self.memo.get(value)

    def keep(self, op: Op, layouts: Sequence[ExpertLayout | None]) -> None:
        for output, layout in zip(op.outputs, layouts, strict=True):
            if layout is None:
                self.opaque_values.add(output)
            else:
                self.opaque_values.discard(output)
                self.memo[output] = layout

    def belongs(self, op: Op) -> bool:
        """Whether the op may belong to the block: it comes after the tokens, or rearranges or
        gathers weights."""
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

    def weight(self, value: Value) -> ExpertLayout:
        """The layout of a param, or of a param that was only rearranged."""
        op = self.scope.maker(value)
        if op is not None and op.name in REARRANGE:
            source = self.read(op.inputs[0])
            if source is not None:
                try:
                    return self.move(op, source)
                except NoMatch:
                    pass  # then `value` itself is read as a weight
        stacked = not self.writer.alone and len(value.shape) > 1
        if stacked and self.writer.experts is None and len(value.shape) == 3:
            self.writer.experts = cast(int, value.shape[0])
        stacked = stacked and value.shape[0] == self.writer.experts
        atoms = tuple(Atom(size, stacked and axis == 0) for axis, size in enumerate(value.shape))
        axes = tuple((a,) if a.size != 1 or a.rows else () for a in atoms)
        expert = atoms[0] if stacked else None
        return ExpertLayout(value, atoms, axes, param=True, expert=expert)

    def tokens(self, value: Value) -> ExpertLayout:
        """The layout of rows before any expert's product. The first such value becomes `x`."""
        layout = self.memo.get(value)
        if layout is not None:
            return layout
        op = self.scope.maker(value)
        if op is not None and self.only is None and spreads(self, op):
            which = carrier(self, op)
            self.tokens(op.inputs[which])
            layouts = self.apply(op)
            self.keep(op, layouts)
            spread = self.memo.get(value)
            if spread is not None:
                return spread
        if self.x is not None:
            return self.reshaped_tokens(value)
        if op is not None and op.name in REARRANGE and value.shape[-1] == 1:  # split features
            self.tokens(op.inputs[0])
            self.keep(op, self.apply(op))
            return self.memo[value]
        return self.begin(value)

    def begin(self, value: Value) -> ExpertLayout:
        """Makes `value` the rows `x`, however they were computed from the tokens. Raises NoMatch if
        it has fewer than two axes."""
        self.x = value
        if len(value.shape) < 2:
            raise NoMatch(f"{value} has no axis of rows with features")
        axes = [(Atom(d, True),) if d != 1 else () for d in value.shape[:-1]]
        feature = Atom(value.shape[-1], False)
        base = Value("x", TensorType(value.dtype, (ROWS, value.shape[-1])))
        self.memo[value] = ExpertLayout(base, (feature,), (*axes, (feature,)))
        self.opaque_values.clear()  # they were read before `x` was set
        return self.memo[value]

    @property
    def root(self) -> Value:
        """The tokens before any reshape; the region begins here."""
        assert self.x is not None
        return self.scope.source_of(self.x)

    def reshaped_tokens(self, value: Value) -> ExpertLayout:
        """The layout of the tokens in another shape. Raises NoMatch if `value` is another value."""
        assert self.x is not None
        if self.scope.source_of(value) is not self.root:
            raise NoMatch(f"experts read both {self.x.name} and {value.name}")
        axes, splits = regroup(self.memo[self.x].axes, value.shape)
        if splits and any(not atom.rows for atom in splits):
            raise NoMatch(f"{value.name} slices the features of {self.x.name}")
        self.memo[value] = replace(self.memo[self.x], axes=axes)
        return self.memo[value]

    def is_zeros(self, value: Value) -> bool:
        op = self.scope.made_by(value, *ZEROS)
        return op is not None and op.attrs.get("fill_value", op.attrs.get("s", 0)) in (0, False)

    def use(self, role: str, value: Value) -> None:
        values = self.uses.setdefault(role, [])
        if value not in values:
            values.append(value)

    def doubt(self, value: Value) -> None:
        """Records why `value`, which weights rows, may be made of rows and no routing weight."""
        count = counting(self.scope, value)
        if count is not None:
            self.doubts.append(str(not_row_wise(count, "counts the rows")))
        ops = self.scope.upstream([value]) if self.only is not None else ()
        self.doubts += [self.why[v] for op in ops for v in op.outputs if v in self.why]

    @abstractmethod
    def apply(self, op: Op) -> Sequence[ExpertLayout | None]:
        """The layouts of the op's outputs. Raises NoMatch if rows pass through an op that one
        expert's body cannot contain."""

    def fan(self, op: Op, fan: Fan) -> ExpertLayout:
        """The layout of a fan's result: every expert over the same rows, or over its own rows."""
        if self.writer.experts not in (None, fan.experts):
            raise NoMatch(
                f"it has {self.writer.experts} experts in one part and {fan.experts} in another"
            )
        self.writer.experts = fan.experts
        source = self.tokens(fan.x)
        for role, values in fan.uses.items():
            for value in values:
                self.use(role, value)
        if fan.split is not None:
            self.use("split", fan.split.outputs[0])
        shape = op.outputs[0].shape
        axes = list(fan.axes)
        dim = cast(int, op.attrs.get("dim", 0)) % len(shape)
        if fan.split is not None:
            axes[:1] = [source.axes[0]]  # the sum of data-dependent sizes is the number of rows
        elif fan.one_expert_per_row and dim < len(shape) - 1:
            axes[:-1] = regroup(source.axes[:-1], shape[:-1])[0]
        else:
            axes[dim] = (Atom(fan.experts, True), *axes[dim])
        return self.writer.inline(source, fan.body, fan.stacks, tuple(axes))

    def move(self, op: Op, source: ExpertLayout) -> ExpertLayout:
        """The layout after a reshape, permute, expand or repeat."""
        shape = op.outputs[0].shape
        if op.name == "aten.permute.default":
            dims = cast("tuple[int, ...]", op.attrs["dims"])
            return replace(source, axes=tuple(source.axes[d] for d in dims))
        if op.name in ("aten.expand.default", "aten.repeat.default"):
            added = len(shape) - len(source.axes)
            axes: list[Axis] = []
            for position, dim in enumerate(shape):
                axis = source.axes[position - added] if position >= added else ()
                if size_of(axis) != dim:
                    times = (
                        dim if not axis else cast("tuple[Dim, ...]", op.attrs["repeats"])[position]
                    )
                    if not only_rows(axis):
                        raise NoMatch(f"{op.name} repeats a feature axis")
                    axis = (Atom(times, True), *axis)
                axes.append(axis)
            return replace(source, axes=tuple(axes))
        grouped, splits = regroup(source.axes, shape)
        moved = replace(source, axes=grouped)
        for atom, parts in splits.items():
            moved = self.split(moved, atom, parts)
        return moved

    def split(self, layout: ExpertLayout, atom: Atom, parts: tuple[Atom, ...]) -> ExpertLayout:
        if atom not in layout.atoms:
            return layout  # rows
        if atom is layout.expert:
            raise NoMatch("a reshape cuts the expert axis of a stack")
        atoms = tuple(p for a in layout.atoms for p in (parts if a is atom else (a,)))
        return self.writer.rebase(layout, atoms)

    def opaque(self, op: Op, layouts: Sequence[ExpertLayout | None]) -> str:
        parts = [v for v, la in zip(op.inputs, layouts, strict=True) if la is None]
        return ", ".join(v.name + (f" ({self.why[v]})" if v in self.why else "") for v in parts)


def spreads(reader: BlockReader, op: Op) -> bool:
    """Whether the result of `op` consists of copies of the tokens, not of the tokens themselves."""
    if op.name in REARRANGE or op.name in CASTS:
        return only_moves(reader, op)
    if op.name in MULTIPLY and len(op.inputs) == 2:
        return any(v.shape[-1:] == (1,) and chooses(reader.scope, v) for v in op.inputs)
    if op.name in PRODUCTS:
        return len(op.inputs) == 2 and chooses(reader.scope, op.inputs[0])
    if op.name == "aten.index_put.default":
        return reader.is_zeros(op.inputs[0])
    return op.name in SPREAD


def only_moves(reader: BlockReader, op: Op) -> bool:
    """Whether the value holds copies of the tokens, or [T, D] itself, with its axes rearranged."""
    value = op.outputs[0]
    flat = len(value.shape) == 2 and op.name not in CASTS
    maker: Op | None = op
    while maker is not None and (maker.name in REARRANGE or maker.name in CASTS):
        source = maker.inputs[0]
        if product(maker.outputs[0].shape) != product(source.shape):
            return True
        if len(source.shape) == 2 and not flat and source.shape[-1] in value.shape:
            return True
        maker = reader.scope.maker(source)
    return maker is not None and spreads(reader, maker)


def carrier(reader: BlockReader, op: Op) -> int:
    """The index of the input that holds the tokens."""
    if op.name in MULTIPLY:
        return 0 if op.inputs[1].shape[-1:] == (1,) and chooses(reader.scope, op.inputs[1]) else 1
    if op.name in PRODUCTS:
        return 1
    return len(op.inputs) - 1 if op.name == "aten.index_put.default" else 0
