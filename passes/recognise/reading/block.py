"""A proposal that a region is an MoE block: its parts, and the ops that replace the region."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from moec.dtypes import FLOATS
from moec.ir.graph import Attr, DType, Graph, Op, Ref, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.passes.proof.input_generators import Feed
from moec.passes.recognise.reading.body import Prepared, canonical, with_columns
from moec.passes.recognise.reading.shared_rows import side_by_side
from moec.passes.recognise.region import Recipe, RegionEmitter


def keep_value(value: Value) -> Recipe:
    return lambda emit: emit.old(value)


@dataclass(frozen=True)
class Candidate:
    """An op at which a block may end. `propose` yields the proposals for it; it raises NoMatch with
    the reason if there are none. The proposals are alternatives, of which the first that is proved
    is the block; if they are `several`, all that are proved are blocks, one for each output."""

    at: Op
    propose: Callable[[], Iterator[Proposal]]
    several: bool = False


@dataclass(frozen=True)
class Priority:
    """The order in which a full expert accepts tokens. `numbers` is [T]: the expert keeps the
    tokens with the smallest numbers or, if `descending`, the greatest."""

    numbers: Value
    descending: bool = False


@dataclass(frozen=True)
class RecognisedCapacity:
    size: Dim
    order: str  # "slot" or "token", as in moe.capacity
    priority: Priority | None = None  # None: in order; only blocks with k = 1 have one


@dataclass(frozen=True)
class Zero:
    """Experts without a network. Their ids start at `num_experts`; `kinds` are those of
    moe.zero_experts. `mix` [C, 2, D] and `constants` [C, D] are recipes for its params, where C
    counts the experts of kind "constant"."""

    kinds: tuple[str, ...]
    mix: Recipe | None = None
    constants: Recipe | None = None


@dataclass(frozen=True)
class Proposal:
    """A claim that `output` is the weighted sum of `body(x)` over the chosen experts of each token.
    With more rows than tokens, `output` holds the results of the choices one by one, and `top_k`,
    the number of them in a sum, is 1.

    `experts` and `weights` are recipes for [T, k]; `weights` of None means 1. `stacks` are recipes
    for [E, ..], in the order of the params of `body`. The region begins at the values `cut`;
    `feeds` says which random inputs the proof gives to them. `addend` is the initial value of the
    sum, None if that is zero. `zero` describes the experts with ids from `num_experts` on; if it is
    None, these ids add nothing. `doubts` are the likely reasons if the proof refuses the proposal.
    Rows of the values `shared` follow those of `x` in a row that is dispatched, as the body reads
    it.
    """

    form: str
    output: Value
    x: Value
    experts: Recipe
    weights: Recipe | None
    top_k: int
    num_experts: int
    stacks: tuple[Recipe, ...]
    body: Graph
    cut: tuple[Value, ...]
    feeds: Mapping[Value, Feed] = field(default_factory=dict)
    input_side: bool = False
    capacity: RecognisedCapacity | None = None
    addend: Value | None = None
    zero: Zero | None = None
    doubts: tuple[str, ...] = ()
    shared: tuple[Value, ...] = ()


def emit_block(block: Proposal, emit: RegionEmitter) -> Value:
    """Emits the ops of the block. Returns the value that replaces `block.output`."""
    x, *beside = (emit.rows(emit.old(value)) for value in (block.x, *block.shared))
    choice = block.experts(emit)
    if block.capacity:
        choice = _limited(block.capacity, block.num_experts, choice, emit)
    weights = block.weights(emit) if block.weights else None
    if weights is not None and weights.dtype not in FLOATS:  # masks or counts
        weights = emit.cast(weights, block.output.dtype)
    body, prepared = canonical(with_columns(block.body), block.num_experts)
    stacks = [stacked(block.stacks[p.source](emit), p, emit) for p in prepared]
    dispatched = [side_by_side([x, *beside], emit), choice]
    if block.input_side and weights is not None:
        dispatched.append(weights)
    attrs: dict[str, Attr] = {"num_experts": block.num_experts}
    stem, tokens = block.output.name, product(block.output.shape[:-1])
    rows, order, ends = emit("moe.dispatch", dispatched, attrs=attrs, named=f"{stem}_rows")
    (outputs,) = emit(
        "moe.experts",
        [rows, ends, *stacks],
        attrs={"form": block.form},
        body=body,
        named=f"{stem}_out",
    )
    combined = [outputs, order]
    attrs = {"k": block.top_k, "tokens": tokens, "dtype": DType(block.output.dtype)}
    if weights is not None and not block.input_side:
        combined.append(weights)
        attrs["weighted"] = True
    (y,) = emit("moe.combine", combined, attrs=attrs, named=stem)
    if block.zero is not None:
        zero = _zero(block.zero, block, x, choice, weights, emit)
        (y,) = emit("aten.add.Tensor", [y, zero], [y.type])
    y = emit.reshape(y, block.output.shape)
    if block.addend is not None:
        addends = [emit.old(block.addend), y]
        (y,) = emit("aten.add.Tensor", addends, [block.output.type], named=stem)
    return y


def _limited(capacity: RecognisedCapacity, count: int, choice: Value, emit: RegionEmitter) -> Value:
    """The choices [T, k] after the capacity limit. With a priority, the choices are sorted by it
    before the limit is applied and restored to token order afterwards."""
    attrs: dict[str, Attr] = {
        "num_experts": count,
        "capacity": capacity.size,
        "order": capacity.order,
    }
    if capacity.priority is None:
        return emit("moe.capacity", [choice], attrs=attrs, named=choice.name)[0]
    numbers = emit.reshape(emit.old(capacity.priority.numbers), choice.shape[:1])
    order = _order(numbers, capacity.priority.descending, emit)
    pick: dict[str, Attr] = {"indices": (Ref(1),)}
    (first,) = emit("aten.index.Tensor", [choice, order], [choice.type], attrs=pick)
    (limited,) = emit("moe.capacity", [first], attrs=attrs, named=choice.name)
    back = _order(order, False, emit)
    return emit("aten.index.Tensor", [limited, back], [choice.type], attrs=pick)[0]


def _order(values: Value, descending: bool, emit: RegionEmitter) -> Value:
    types = [values.type, TensorType("i64", values.shape)]
    how = {"descending": True} if descending else None
    return emit("aten.sort.default", [values], types, attrs=how)[1]


def _zero(
    zero: Zero, block: Proposal, x: Value, choice: Value, weights: Value | None, emit: RegionEmitter
) -> Value:
    """The weighted sum [T, D] over the experts without a network that each token chose."""
    inputs = [x, choice]
    attrs: dict[str, Attr] = {"first": block.num_experts, "kinds": zero.kinds}
    if weights is not None:
        inputs.append(weights)
        attrs["weighted"] = True
    count = zero.kinds.count("constant")
    if zero.mix is not None:
        inputs.append(emit.reshape(zero.mix(emit), (count, 2, x.shape[1])))
        attrs["mixed"] = True
    if zero.constants is not None:
        inputs.append(emit.reshape(zero.constants(emit), (count, x.shape[1])))
    attrs["dtype"] = DType(block.output.dtype)
    return emit("moe.zero_experts", inputs, attrs=attrs, named=f"{block.output.name}_zero")[0]


def stacked(value: Value, prepared: Prepared, emit: RegionEmitter) -> Value:
    """The stack after the steps that the canonical body needs (permute, slice, cast)."""
    for name, attrs, shape, dtype in prepared.steps:
        (value,) = emit(name, [value], [TensorType(dtype, shape)], attrs=attrs, named=value.name)
    return value
