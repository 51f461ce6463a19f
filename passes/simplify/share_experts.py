"""Gates that weigh the same experts share them: every expert runs once.

    r1, o1, e1 = moe.dispatch(x, 0..2)                      r, o, e = moe.dispatch(x, 0..3)
    y1 = moe.combine(moe.experts(r1, …a, b, c), o1, w1)     t = moe.experts(r, …a, b, c, d)
    r2, o2, e2 = moe.dispatch(x, 0..1)                 ->   y1 = moe.combine(t, slots[:, :3], w1)
    y2 = moe.combine(moe.experts(r2, …b, d), o2, w2)        y2 = moe.combine(t, slots[:, 1, 3], w2)

Every token uses every expert of each gate. In multi-gate mixtures (Ma et al. 2018,
doi:10.1145/3219819.3220007), all gates weigh the same experts. In customised gate control (Tang et
al. 2020, doi:10.1145/3383313.3412236), each gate weighs the experts of its task and the shared
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from moec.ir.canonical import canonical_text
from moec.ir.graph import Attr, Graph, Op, Program, Ref, Stage, TensorType, Value
from moec.ir.ops.experts.dispatch import chooses_all
from moec.passes.core.rewrite import Builder, rebuild
from moec.passes.core.runner import Log, Pass

_RESHAPE, _STACK = "aten.reshape.default", "aten.stack.default"
_KEEPS_EXPERTS = ("aten.permute.default", _RESHAPE, "aten._to_copy.default")
"""Ops on a stack that keep its first axis, that of the experts; a permutation is checked."""


@dataclass(frozen=True)
class ShareExperts(Pass):
    """Run experts that several gates weigh once, for all of them."""

    name: ClassVar[str] = "share-experts"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        alike: dict[tuple[object, ...], list[Bank]] = {}
        constants = {value for op in constant_ops(graph) for value in op.outputs} | {*graph.params}
        for op in graph.ops:
            bank = bank_of(graph, op) if op.name == "moe.experts" else None
            if bank is not None and all(constants.issuperset(s.weights) for s in bank.stacks):
                alike.setdefault(bank.key(graph), []).append(bank)
        groups = [
            group
            for banks in alike.values()
            for group in overlapping(banks)
            if log.spend(f"experts of {len(group.banks)} gates")
        ]
        return replace(program, graph=share(graph, groups)) if groups else program


@dataclass(frozen=True)
class WeightStack:
    """A stack of weights: one weight for each expert, and the ops applied to all of them."""

    weights: tuple[Value, ...]
    steps: tuple[Op, ...]


@dataclass(frozen=True)
class Bank:
    """The experts that one gate weighs, all of them for every token."""

    dispatch: Op
    experts: Op
    combine: Op
    stacks: tuple[WeightStack, ...]

    @property
    def members(self) -> tuple[tuple[Value, ...], ...]:
        """The weights of each expert, which identify it."""
        return tuple(zip(*(stack.weights for stack in self.stacks), strict=True))

    def key(self, graph: Graph) -> tuple[object, ...]:
        """Equal for banks that read the same rows and whose experts are of one kind."""
        x = self.dispatch.inputs[0]
        moved = graph.producers.get(x)
        source = moved.inputs[0] if moved is not None and moved.name == _RESHAPE else x
        steps = tuple(_text(step) for stack in self.stacks for step in (*stack.steps, None))
        assert self.experts.body is not None
        return (source, str(x.type), canonical_text(self.experts.body), steps)


@dataclass(frozen=True)
class BankGroup:
    """Banks with common experts. `members` are all experts, each once."""

    banks: tuple[Bank, ...]

    @property
    def members(self) -> tuple[tuple[Value, ...], ...]:
        return tuple(dict.fromkeys(member for bank in self.banks for member in bank.members))


def _text(step: Op | None) -> object:
    """A step without the number of experts: equal for equal steps on stacks of other lengths."""
    if step is None:
        return None
    return (step.name, str(step.attrs.get("dims")), str(step.outputs[0].type).partition(",")[2])


def bank_of(graph: Graph, experts: Op) -> Bank | None:
    """The bank of `experts`; None unless every token uses each expert, and one sum reads them."""
    dispatch = graph.producers[experts.inputs[1]]
    readers = graph.readers.get(experts.outputs[0], ())
    if dispatch.name != "moe.dispatch" or len(dispatch.inputs) > 2 or len(readers) != 1:
        return None
    (combine,) = readers
    if combine.name != "moe.combine" or combine.attrs.get("added"):
        return None
    if not chooses_all(graph, dispatch) or combine.inputs[1] is not dispatch.outputs[1]:
        return None
    stacks = [stack_of(graph, value) for value in experts.inputs[2:]]
    if not stacks or None in stacks:
        return None
    return Bank(dispatch, experts, combine, tuple(cast("list[WeightStack]", stacks)))


def stack_of(graph: Graph, value: Value) -> WeightStack | None:
    """The weights that were stacked to `value`; None if it is not made by a stack."""
    steps: list[Op] = []
    op = graph.producers.get(value)
    while op is not None and op.name in _KEEPS_EXPERTS:
        source, dims = op.inputs[0], op.attrs.get("dims", (0,))
        if source.shape[:1] != op.outputs[0].shape[:1] or cast("tuple[int]", dims)[0] != 0:
            return None
        steps.insert(0, op)
        op = graph.producers.get(source)
    if op is None or op.name != _STACK or op.attrs.get("dim", 0) != 0:
        return None
    return WeightStack(op.inputs, tuple(steps))


def constant_ops(graph: Graph) -> list[Op]:
    """The ops whose results depend on params alone, in order."""
    constants, ops = set(graph.params), []
    for op in graph.ops:
        if op.inputs and constants.issuperset(op.inputs):
            ops.append(op)
            constants.update(op.outputs)
    return ops


def overlapping(banks: Sequence[Bank]) -> Iterator[BankGroup]:
    """Groups of several banks. Two banks with a common expert are in the same group."""
    groups: list[BankGroup] = []
    for bank in banks:
        near = [group for group in groups if set(group.members) & set(bank.members)]
        groups = [group for group in groups if group not in near]
        groups.append(BankGroup((*(b for group in near for b in group.banks), bank)))
    yield from (group for group in groups if len(group.banks) > 1)


def share(graph: Graph, groups: Sequence[BankGroup]) -> Graph:
    """The graph with one call of the experts of each group, in place of the first of its banks, and
    all weights computed before."""
    builder, new = Builder(graph), dict[Value, Value]()
    firsts = {group.banks[0].experts: group for group in groups}
    sums = {bank.combine: (bank, group) for group in groups for bank in group.banks}
    replaced_ops = {op for bank, _ in sums.values() for op in (bank.dispatch, bank.experts)}
    results: dict[BankGroup, tuple[Value, Value]] = {}
    constant = dict.fromkeys(constant_ops(graph))
    for op in (*constant, *(op for op in graph.ops if op not in constant)):
        if op in firsts:
            group = firsts[op]
            results[group] = run(builder, group.banks[0], group.members, new)
        elif op in sums:
            bank, group = sums[op]
            rows, slots = results[group]
            numbers = [group.members.index(member) for member in bank.members]
            inputs = [rows, columns(builder, slots, numbers, op)]
            inputs += [new.get(v, v) for v in op.inputs[2:]]
            (new[op.outputs[0]],) = builder.emit(op.name, inputs, like=op, attrs=op.attrs)
        elif op not in replaced_ops:
            builder.append(replace(op, inputs=tuple(new.get(v, v) for v in op.inputs)))
    return rebuild(graph, builder.ops, new)


def run(
    b: Builder, bank: Bank, members: Sequence[tuple[Value, ...]], new: Mapping[Value, Value]
) -> tuple[Value, Value]:
    """Runs all members, of the kind of `bank`: their results, and the row of each [T, E]."""
    like, count = bank.experts, len(members)
    x, old_ids = (new.get(value, value) for value in bank.dispatch.inputs)
    range_type = TensorType(old_ids.dtype, (count,))
    (ids,) = b.emit("aten.arange.default", [], [range_type], like=like, attrs={"end": count})
    shape = (*old_ids.shape[:1], count)
    repeated = TensorType(old_ids.dtype, shape)
    (ids,) = b.emit("aten.expand.default", [ids], [repeated], like=like, attrs={"size": shape})
    attrs: dict[str, Attr] = {**bank.dispatch.attrs, "num_experts": count}
    rows, _, ends = b.emit("moe.dispatch", [x, ids], like=bank.dispatch, attrs=attrs)
    _, slots, _ = b.emit("moe.sort", [ids], like=like, attrs={"num_experts": count})
    stacks = [
        stacked(b, [member[number] for member in members], stack.steps, like)
        for number, stack in enumerate(bank.stacks)
    ]
    inputs = [rows, ends, *stacks]
    (results,) = b.emit("moe.experts", inputs, like=like, attrs=like.attrs, body=like.body)
    return results, slots


def stacked(b: Builder, weights: Sequence[Value], steps: Sequence[Op], like: Op) -> Value:
    shape = (len(weights), *weights[0].shape)
    stacked_type = TensorType(weights[0].dtype, shape)
    attrs: Mapping[str, Attr] = {"tensors": tuple(map(Ref, range(len(weights))))}
    (value,) = b.emit(_STACK, weights, [stacked_type], like=like, attrs=attrs)
    for step in steps:
        target = replace(step.outputs[0].type, shape=(len(weights), *step.outputs[0].shape[1:]))
        attrs = {**step.attrs, "shape": target.shape} if step.name == _RESHAPE else step.attrs
        (value,) = b.emit(step.name, [value], [target], like=like, attrs=attrs)
    return value


def columns(b: Builder, slots: Value, numbers: Sequence[int], like: Op) -> Value:
    """The columns `numbers` of `slots` [T, E], in this order."""
    if list(numbers) == list(range(cast(int, slots.shape[1]))):
        return slots
    parts: list[Value] = []
    for start, end in _runs(numbers):
        part = TensorType(slots.dtype, (slots.shape[0], end - start))
        attrs: dict[str, Attr] = {"dim": 1, "start": start, "end": end}
        parts += b.emit("aten.slice.Tensor", [slots], [part], like=like, attrs=attrs)
    if len(parts) == 1:
        return parts[0]
    joined = TensorType(slots.dtype, (slots.shape[0], len(numbers)))
    attrs = {"tensors": tuple(map(Ref, range(len(parts)))), "dim": 1}
    return b.emit("aten.cat.default", parts, [joined], like=like, attrs=attrs)[0]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges of consecutive numbers, (start, end)."""
    start = 0
    for position in range(1, len(numbers) + 1):
        if position == len(numbers) or numbers[position] != numbers[position - 1] + 1:
            yield numbers[start], numbers[position - 1] + 1
            start = position
