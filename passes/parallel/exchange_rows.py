"""Emits the exchange of one layer on one rank, from sorted rows to the experts and back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import sympy
import torch

from moec.ir.graph import Attr, DType, Op, TensorType, Value
from moec.ir.opdef import OPS
from moec.ir.sizes.dims import Bounds, Dim, symbol
from moec.passes.core.moe_layer import Splice, constant
from moec.passes.parallel.slice_experts import Sliced
from moec.plan.groups import near, suffix
from moec.plan.plan import LayerPlan, Plan


@dataclass(frozen=True)
class _Way:
    """One exchange among the ranks of a group. Forward, `total` rows are sent by the counts `send`,
    and `arriving` rows are received by the counts `receive`; backward, the roles are swapped."""

    group: str
    send: Value
    receive: Value
    arriving: Dim
    total: Dim


@dataclass
class Exchanged:
    """Emits the ops of rank `rank` into `splice`; `number` makes the names of sizes unique per
    layer."""

    splice: Splice
    plan: Plan
    layer: LayerPlan
    rank: int
    number: int
    experts: Op
    dispatch: Op
    slices: Sliced | None
    ops: list[Op] = field(default_factory=list)
    bounds: dict[str, Bounds] = field(default_factory=dict)

    @property
    def position(self) -> int:
        """This rank's index among the ranks of its expert group."""
        return self.rank // self.layer.slices % self.layer.ranks

    @property
    def order(self) -> list[int]:
        """The expert ranks in the order in which their slots are numbered. With staged exchange,
        rows go through the node first, so the order is by local rank, then by node."""
        ranks = list(range(self.layer.ranks))
        if not self.staged:
            return ranks
        local = near(self.layer, self.plan.node_size)
        return sorted(ranks, key=lambda rank: (rank % local, rank // local))

    @property
    def staged(self) -> bool:
        return self.layer.form in ("hierarchical", "rail")

    def build(self) -> dict[str, Bounds]:
        """Replaces dispatch and experts. Returns the bounds of the sizes that are read from
        counts."""
        rows, ends = self._dispatched()
        slot = self._op("dist.slot_of", (ends,), rows=rows.shape[0])
        local = self._looked_up("slot", self._local_slots(), slot)
        sizes = [len(self.layer.slots[rank]) for rank in self.order]
        if self.staged:
            result = self._two_stages(rows, ends, slot, local, sizes)
        else:
            way = self._way("ep", ends, tuple(sizes), rows.shape[0])
            result = self._back(way, self._computed(self._sent(way, rows), self._sent(way, local)))
        assert self.ops[-1].outputs == (result,)
        self.ops[-1] = replace(self.ops[-1], outputs=self.experts.outputs)
        self.splice.put(self.experts, self.ops)
        return self.bounds

    # ---- the parts ---------------------------------------------------------------------

    def _dispatched(self) -> tuple[Value, Value]:
        """Dispatches to slots instead of experts: the rows sorted by slot, and the end of each
        slot."""
        first, holders = slots_of(self.layer, self.order)
        tables = [self._table("first", first), self._table("holders", holders)]
        before: list[Op] = []
        ids = self.dispatch.inputs[1]
        slots = self._op("dist.assign", (ids, *tables), into=before)
        rows, order, ends = self.dispatch.outputs
        count = len(holders)
        new = self.splice.value(ends.name, TensorType("i32", (count,)))
        dispatch = replace(
            self.dispatch,
            inputs=(self.dispatch.inputs[0], slots, *self.dispatch.inputs[2:]),
            outputs=(rows, order, new),
            attrs={**self.dispatch.attrs, "num_experts": count},
        )
        self.splice.put(self.dispatch, [*before, dispatch])
        return rows, new

    def _local_slots(self) -> torch.Tensor:
        """The index of each slot on its rank, i64[slots + 1]; the last entry, for rows without a
        slot, is 0."""
        return torch.tensor(
            [i for rank in self.order for i in range(len(self.layer.slots[rank]))] + [0]
        )

    def _two_stages(
        self, rows: Value, ends: Value, slot: Value, local: Value, sizes: list[int]
    ) -> Value:
        """Exchanges rows in two stages and back: within the node, to the rank with the local index
        of the destination, then between nodes, along the rail."""
        here = near(self.layer, self.plan.node_size)
        nodes = self.layer.ranks // here
        parts = tuple(sum(sizes[i * nodes : (i + 1) * nodes]) for i in range(here))
        node_of = [rank // here for rank in self.order for _ in self.layer.slots[rank]]
        node = self._looked_up("node", torch.tensor([*node_of, 0]), slot)
        inside = self._way("node", ends, parts, rows.shape[0])
        target = self._sent(inside, node)
        target = self._column(target)
        by_node, order, node_ends = self._sorted(self._sent(inside, rows), target, nodes)
        slots, _, _ = self._sorted(self._column(self._sent(inside, local)), target, nodes)
        across = self._way("rail", node_ends, (1,) * nodes, by_node.shape[0])
        arrived = self._sent(across, by_node)
        result = self._computed(arrived, self._sent(across, self._flat(slots)))
        return self._back(inside, self._unsorted(self._back(across, result), order))

    def _way(self, kind: str, ends: Value, parts: tuple[int, ...], total: Dim) -> _Way:
        """Exchanges counts within a group: rank i receives the rows of the next parts[i] slots of
        `ends`."""
        group = f"{kind}.{suffix(self.layer)}"
        send = self._op("dist.counts", (ends,), parts=parts)
        receive = self._op("dist.all_to_all", (send,), group=group, rows=len(parts))
        return _Way(group, send, receive, self._size(kind, receive), total)

    def _sent(self, way: _Way, value: Value) -> Value:
        inputs = value, way.send, way.receive
        return self._op("dist.all_to_all", inputs, group=way.group, rows=way.arriving)

    def _back(self, way: _Way, value: Value) -> Value:
        inputs = value, way.receive, way.send
        return self._op("dist.all_to_all", inputs, group=way.group, rows=way.total)

    def _computed(self, rows: Value, slots: Value) -> Value:
        """The results [N, D] of this rank's experts for rows [N, D] in any order, in the same
        order."""
        gathered = counts = None
        if self.slices is not None:
            group = f"slice.{suffix(self.layer)}"
            count = self._op("dist.row_count", (slots,))
            counts = self._op("dist.all_gather", (count,), group=group, rows=self.layer.slices)
            size = self._size("slice", counts)
            gathered = rows.shape[0]
            rows = self._op("dist.all_gather", (rows, counts), group=group, rows=size)
            slots = self._op("dist.all_gather", (slots, counts), group=group, rows=size)
        held = self.layer.slots[self.position]
        sorted_rows, order, ends = self._sorted(rows, self._column(slots), len(held))
        stacks = [
            self.splice.weight(v.name, self._part(v, i, held))
            for i, v in enumerate(self.experts.inputs[2:])
        ]
        body = self.experts.body if self.slices is None else self.slices.body
        draft = replace(self.experts, inputs=(sorted_rows, ends, *stacks), outputs=(), body=body)
        types = OPS["moe.experts"].infer(draft)
        out = self.splice.value(self.experts.outputs[0].name, types[0])
        self.ops.append(replace(draft, outputs=(out,)))
        result = self._unsorted(out, order)
        if gathered is None or counts is None:
            return result
        group = f"slice.{suffix(self.layer)}"
        return self._op("dist.reduce_scatter", (result, counts), group=group, rows=gathered)

    def _part(self, value: Value, index: int, held: tuple[int, ...]) -> torch.Tensor:
        """This rank's experts of a stack; if experts are sliced, this rank's slice of them."""
        stack = constant(self.splice.program, value)[list(held)]
        if self.slices is None:
            return stack
        assert self.experts.body is not None
        axis = self.slices.axes[self.experts.body.params[index]]
        part = self.rank % self.layer.slices
        if axis is None:
            return stack if part == 0 else torch.zeros_like(stack)
        return stack.chunk(self.layer.slices, axis + 1)[part].contiguous()

    # ---- single ops --------------------------------------------------------------------

    def _op(
        self, op: str, inputs: tuple[Value, ...], /, into: list[Op] | None = None, **attrs: Attr
    ) -> Value:
        draft = Op(op, inputs, (), attrs, None, self.experts.origin)
        (type,) = OPS[op].infer(draft)
        output = self.splice.value(op.partition(".")[2], type)
        (self.ops if into is None else into).append(replace(draft, outputs=(output,)))
        return output

    def _table(self, name: str, tensor: torch.Tensor) -> Value:
        return self.splice.weight(f"{self.experts.origin}.{name}", tensor)

    def _looked_up(self, name: str, table: torch.Tensor, slot: Value) -> Value:
        """table[slot]: i64."""
        type = TensorType("i64", slot.shape)
        param = self._table(name, table)
        return self.splice.emit(
            self.ops, "aten.index_select.default", (param, slot), type, self.experts, dim=0
        )

    def _size(self, kind: str, counts: Value) -> sympy.Symbol:
        """A named size that is the sum of counts."""
        total = self.splice.emit(
            self.ops, "aten.sum.default", (counts,), TensorType("i64", ()), self.experts
        )
        name = f"{kind}_rows{self.number}"
        self._op("moec.size", (total,), name=name)
        self.bounds[name] = Bounds(0, None)
        return symbol(name)

    def _column(self, value: Value) -> Value:
        return self._shaped(value, value.shape[0], 1)

    def _flat(self, value: Value) -> Value:
        return self._shaped(value, value.shape[0])

    def _shaped(self, value: Value, *shape: Dim) -> Value:
        return self.splice.emit(
            self.ops, "aten.reshape.default", (value,), TensorType(value.dtype, shape),
            self.experts, shape=shape,
        )  # fmt: skip

    def _sorted(
        self, rows: Value, keys: Value, count: int, scales: tuple[Value, ...] = ()
    ) -> tuple[Value, Value, Value]:
        """Dispatches rows by their keys [rows, n]. Returns the sorted rows, their order and the
        ends."""
        draft = Op(
            "moe.dispatch", (rows, keys, *scales), (), {"num_experts": count}, None,
            self.experts.origin,
        )  # fmt: skip
        types = OPS["moe.dispatch"].infer(draft)
        names = [value.name for value in self.dispatch.outputs]
        outputs = tuple(self.splice.value(n, t) for n, t in zip(names, types, strict=True))
        self.ops.append(replace(draft, outputs=outputs))
        return outputs[0], outputs[1], outputs[2]

    def _unsorted(self, rows: Value, order: Value) -> Value:
        """The rows in the order from before the dispatch."""
        return self._op(
            "moe.combine", (rows, order), k=1, tokens=order.shape[0], dtype=DType(rows.dtype)
        )


def slots_of(layer: LayerPlan, ranks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables `first` i64[E + 1] and `slots` i64[P] of dist.assign. The slots are numbered by
    expert rank, in the order `ranks`."""
    holders: list[list[int]] = [[] for _ in range(layer.experts)]
    slot = 0
    for rank in ranks:
        for expert in layer.slots[rank]:
            holders[expert].append(slot)
            slot += 1
    first = torch.tensor([0, *map(len, holders)]).cumsum(0)
    return first, torch.tensor([s for row in holders for s in row])
