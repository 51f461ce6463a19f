"""A proposal: this region is an MoE block. What it consists of, and the ops that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from moec.aten import IR_DTYPES, TORCH_DTYPES
from moec.ir import Attr, DType, Graph, Op, TensorType, Value
from moec.passes.prove import Feed
from moec.passes.recognise.body import Prepared, canonical
from moec.passes.recognise.region import Emitter
from moec.sizes import Dim, product

Recipe = Callable[[Emitter], Value]
"""How a value of the next graph is made from values of the old one."""


def same(value: Value) -> Recipe:
    return lambda emit: emit.old(value)


@dataclass(frozen=True)
class Candidate:
    """A place that looks like a block; `propose` says what it might be, or why it is none."""

    at: Op
    propose: Callable[[], Iterator[Proposal]]


@dataclass(frozen=True)
class Capacity:
    size: Dim
    order: str  # "slot" or "token", as in moe.capacity


@dataclass(frozen=True)
class Proposal:
    """`output` is what `body` of the chosen experts makes of `x`, weighted and summed.

    `experts` and `weights` give [T, k]; weights of None mean 1. `stacks` are [E, ..], in the
    order of the body's params. `cut` and `feeds` say where the region begins and how to feed
    it in the proof. `addend` is what the sum starts from, where that is not zero. `copies`: ids
    of `num_experts` and more add the weighted row itself (else nothing).
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
    capacity: Capacity | None = None
    addend: Value | None = None
    copies: bool = False


def emit_block(block: Proposal, emit: Emitter) -> Value:
    """The ops of the block; answers with what stands for `block.output`."""
    x = emit.rows(emit.old(block.x))
    choice = block.experts(emit)
    if block.capacity:
        attrs: dict[str, Attr] = {
            "num_experts": block.num_experts,
            "capacity": block.capacity.size,
            "order": block.capacity.order,
        }
        (choice,) = emit("moe.capacity", [choice], attrs=attrs, named=choice.name)
    weights = block.weights(emit) if block.weights else None
    body, prepared = canonical(block.body, block.num_experts)
    stacks = [_stack(block.stacks[p.source](emit), p, emit) for p in prepared]
    routed = choice
    if block.copies:  # of the body's experts, the others are none
        attrs = {"max": block.num_experts}
        (routed,) = emit("aten.clamp.default", [choice], [choice.type], attrs=attrs)
    dispatched = [x, routed]
    if block.input_side and weights is not None:
        dispatched.append(weights)
    attrs = {"num_experts": block.num_experts}
    stem = block.output.name
    rows, order, ends = emit("moe.dispatch", dispatched, attrs=attrs, named=f"{stem}_rows")
    (made,) = emit(
        "moe.experts",
        [rows, ends, *stacks],
        attrs={"form": block.form},
        body=body,
        named=f"{stem}_out",
    )
    combined = [made, order]
    k = block.top_k
    tokens = product(block.output.shape[:-1])
    attrs = {"k": k, "tokens": tokens, "dtype": DType(block.output.dtype)}
    if weights is not None and not block.input_side:
        combined.append(weights)
        attrs["weighted"] = True
    (y,) = emit("moe.combine", combined, attrs=attrs, named=stem)
    if block.copies:
        (y,) = emit("aten.add.Tensor", [y, _copied(block, x, choice, weights, emit)], [y.type])
    y = emit.reshape(y, block.output.shape)
    if block.addend is None:
        return y
    inputs = [emit.old(block.addend), y]
    return emit("aten.add.Tensor", inputs, [block.output.type], named=stem)[0]


def _copied(
    block: Proposal, x: Value, choice: Value, weights: Value | None, emit: Emitter
) -> Value:
    """x[T, D] times the weights of those choices that are no expert of the body."""
    type = TensorType("bool", choice.shape)
    (beyond,) = emit("aten.ge.Scalar", [choice], [type], attrs={"other": block.num_experts})
    share = emit.cast(beyond, weights.dtype if weights is not None else x.dtype)
    if weights is not None:
        (share,) = emit("aten.mul.Tensor", [share, weights], [share.type])
    type = TensorType(share.dtype, (choice.shape[0], 1))
    attrs: dict[str, Attr] = {"dim": (1,), "keepdim": True}
    (share,) = emit("aten.sum.dim_IntList", [share], [type], attrs=attrs)
    dtype = IR_DTYPES[torch.promote_types(TORCH_DTYPES[x.dtype], TORCH_DTYPES[share.dtype])]
    (rows,) = emit("aten.mul.Tensor", [x, share], [TensorType(dtype, x.shape)])
    return emit.cast(rows, block.output.dtype)


def _stack(value: Value, prepared: Prepared, emit: Emitter) -> Value:
    for name, attrs, shape, dtype in prepared.steps:
        (value,) = emit(name, [value], [TensorType(dtype, shape)], attrs=attrs, named=value.name)
    return value
