"""The exchange of one layer on one rank in which a token goes to each node once (DeepEP).

    slots = dist.assign(ids, first, holders)            [T, k]
    once = dist.first_of(node of each slot)             the nodes of a token, each once
    received = moe.dispatch(x, once)                    along the rail, with slots and weights
    rows = moe.dispatch(received, rank of each slot)    in the node, to each expert's rank
    out = moe.experts(rows, …)                          and back inside the node
    part = moe.combine(out, order, weights)             the sum of this node's experts, sent back
    y = moe.combine(part, order)                        the sum over the nodes

Each token crosses to a node once however many experts it has there, and one sum of their results
crosses back. The sums are in another order than those of one process, and in low precision the sum
of each node is rounded.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.ir.opdef import OPS
from moec.ir.sizes.dims import Bounds
from moec.passes.parallel.exchange_rows import Exchanged, slots_of
from moec.plan.groups import near


def combine_of(graph: Graph, experts: Op, dispatch: Op) -> Op:
    """The sum over each token's experts. Raises NoMatch if another op reads their rows, or if an op
    other than the experts reads what is dispatched."""
    readers = graph.readers.get(experts.outputs[0], ())
    if [op.name for op in readers] != ["moe.combine"] or experts.outputs[0] in graph.results:
        raise NoMatch("a deduplicated exchange needs a moe.combine that alone reads the experts")
    (combine,) = readers
    for value in dispatch.outputs:
        other = [op for op in graph.readers.get(value, ()) if op not in (experts, combine)]
        if other or value in graph.results:
            what = other[0].name if other else "an output of the model"
            raise NoMatch(f"{value.name}, whose rows are deduplicated, is also read by {what}")
    return combine


class SentOnce(Exchanged):
    """Emits the ops of rank `rank` in place of dispatch, experts and combine."""

    def build_with(self, combine: Op) -> dict[str, Bounds]:
        """Replaces the layer up to `combine`. Returns the bounds of the sizes that are read from
        counts."""
        here = near(self.layer, self.plan.node_size)
        x, ids, *scales = self.dispatch.inputs
        weights = combine.inputs[2:3] if combine.attrs.get("weighted") else ()
        first, holders = slots_of(self.layer, self.order)
        tables = self._table("first", first), self._table("holders", holders)
        slots = self._op("dist.assign", (ids, *tables))
        nodes = self.layer.ranks // here
        node = [rank // here for rank, held in enumerate(self.layer.slots) for _ in held]
        node_of_slot = self._look_up("node", torch.tensor([*node, nodes]), slots)
        once = self._op("dist.first_of", (node_of_slot,), other=nodes)
        rows, order, ends = self._sorted(x, once, nodes)
        across = self._way("rail", ends, (1,) * nodes, rows.shape[0])
        received = self._sent(across, rows)
        slots = self._sent(across, self._sorted(slots, once, nodes)[0])
        scales = [self._sent(across, self._sorted(v, once, nodes)[0]) for v in scales]
        weights = tuple(self._sent(across, self._sorted(v, once, nodes)[0]) for v in weights)
        result = self._inside(received, slots, tuple(scales), here)
        part = self._combined(combine, (*result, *weights), tokens=received.shape[0], added=False)
        back = self._back(across, part)
        addends = combine.inputs[2 + len(weights) :]
        self._combined(combine, (back, order, *addends), weighted=False)
        self.ops[-1] = replace(self.ops[-1], outputs=combine.outputs)
        self.splice.put(self.dispatch, [])
        self.splice.put(self.experts, [])
        self.splice.put(combine, self.ops)
        return self.bounds

    def _inside(
        self, rows: Value, slots: Value, scales: tuple[Value, ...], here: int
    ) -> tuple[Value, Value]:
        """The results of this node's experts for rows [M, D] with slots [M, k], by rank of the
        node, and their order."""
        this = self.position // here
        ranks = [
            rank % here if rank // here == this else here
            for rank, held in enumerate(self.layer.slots)
            for _ in held
        ]
        target = self._look_up("local_rank", torch.tensor([*ranks, here]), slots)
        by_rank, order, ends = self._sorted(rows, target, here, scales)
        count = slots.shape[0] * slots.shape[1]
        local = self._look_up("slot", self._local_slots(), slots)
        column, key = self._shaped(local, count, 1), self._shaped(target, count, 1)
        sorted_slots = self._flat(self._sorted(column, key, here)[0])
        inside = self._way("node", ends, (1,) * here, by_rank.shape[0])
        arrived = self._sent(inside, by_rank)
        result = self._computed(arrived, self._sent(inside, sorted_slots))
        return self._back(inside, result), order

    def _look_up(self, name: str, table: torch.Tensor, slots: Value) -> Value:
        """table[slots]: i64[T, k]."""
        flat = self._shaped(slots, slots.shape[0] * slots.shape[1])
        return self._shaped(self._looked_up(name, table, flat), *slots.shape)

    def _combined(self, combine: Op, inputs: tuple[Value, ...], **attrs: object) -> Value:
        draft = replace(combine, inputs=inputs, outputs=(), attrs={**combine.attrs, **attrs})
        (type,) = OPS["moe.combine"].infer(draft)
        output = self.splice.value(combine.outputs[0].name, type)
        self.ops.append(replace(draft, outputs=(output,)))
        return output
