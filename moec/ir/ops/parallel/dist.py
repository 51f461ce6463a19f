"""dist.*: collectives. Groups of ranks have names (ep, slice, node, rail); the caller of a graph
decides their members.

The meaning of a collective depends on the other ranks. `meanings` takes it from a `Ranks`, which
moec.ir.interpret.ranks simulates in one process and torch.distributed provides between processes.
Without one, a graph is evaluated as the only rank of every group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from moec.errors import IRError
from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Reference, Runner, defop, require
from moec.ir.sizes.dims import Dim, canonical


class Ranks(Protocol):
    """The communication of one rank with the others of a group."""

    def exchange(
        self, group: str, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        """Send the first send[0] rows to the group's first rank, the next send[1] to the second,
        and so on. Returns the received rows, receive[i] from rank i, in the order of the ranks."""

    def size(self, group: str) -> int:
        """The number of ranks of the group."""

    def position(self, group: str) -> int:
        """This rank's index in the group."""

    def sum(self, group: str, x: torch.Tensor) -> torch.Tensor:
        """The sum over the group's ranks, added in their order."""


class OnlyRank:
    """The only rank of every group."""

    def exchange(
        self, group: str, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        if len(send) != 1 or list(send) != list(receive):
            raise IRError(f"group {group} has {len(send)} ranks: evaluate them together")
        return rows[: send[0]]

    def size(self, group: str) -> int:
        return 1

    def position(self, group: str) -> int:
        return 0

    def sum(self, group: str, x: torch.Tensor) -> torch.Tensor:
        return x


def _rows(op: Op) -> tuple[TensorType, ...]:
    x = op.inputs[0]
    require(op, isinstance(op.attrs.get("group"), str), "names no group")
    rows = canonical(cast(Dim, op.attrs["rows"]))
    return (TensorType(x.dtype, (rows, *x.shape[1:])),)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows, the missing ones zero."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def all_to_all(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], r: Ranks) -> Any:
    """rows[R, …], send i32[n]?, receive i32[n]? -> [rows, …].

    send[i] rows go to rank i of the group, in order; rows beyond their sum are not sent. Received
    rows are in the order of the ranks, followed by zeros. Without counts, all parts are equal.
    """
    rows = tensors[0]
    if len(tensors) == 3:
        send, receive = (t.tolist() for t in tensors[1:])
    else:
        count = r.size(attrs["group"])
        send = receive = [len(rows) // count] * count
    return _padded(r.exchange(attrs["group"], rows, send, receive), attrs["rows"])


def all_gather(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], r: Ranks) -> Any:
    """x[R, …], counts i32[n]? -> [rows, …]: the rows of all ranks of the group, in their order.
    counts[i] is the number of rows of rank i; without it all have R."""
    x, count = tensors[0], r.size(attrs["group"])
    receive = tensors[1].tolist() if len(tensors) == 2 else [len(x)] * count
    return r.exchange(attrs["group"], torch.cat([x] * count), [len(x)] * count, receive)


def reduce_scatter(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], r: Ranks
) -> Any:
    """x[S, …], counts i32[n] -> [rows, …]: counts[i] rows of the sum over the group go to rank i.

    Added in float32 in the order of the ranks, and rounded once.
    """
    x, send = tensors[0], tensors[1].tolist()
    count, rows = len(send), attrs["rows"]
    parts = r.exchange(attrs["group"], x, send, [rows] * count)
    total = parts[:rows].float()
    for rank in range(1, count):
        total = total + parts[rank * rows : (rank + 1) * rows].float()
    return total.to(x.dtype)


def all_reduce(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], r: Ranks) -> Any:
    """x -> its sum over the ranks of the group."""
    return r.sum(attrs["group"], tensors[0])


def local_rows(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], r: Ranks) -> Any:
    """x[S, …], counts i32[n] -> [rows, …]: this rank's slice of rows of all ranks; rank i has
    counts[i] rows. No communication."""
    x, counts = tensors[0], tensors[1].tolist()
    return x[sum(counts[: r.position(attrs["group"])]) :][: attrs["rows"]]


_COLLECTIVES = {
    "dist.all_to_all": (all_to_all, _rows, "rows, send?, receive?"),
    "dist.all_gather": (all_gather, _rows, "x, counts?"),
    "dist.reduce_scatter": (reduce_scatter, _rows, "x, counts"),
    "dist.local_rows": (local_rows, _rows, "x, counts"),
    "dist.all_reduce": (all_reduce, lambda op: (op.inputs[0].type,), "x"),
}


def meanings(ranks: Ranks) -> dict[str, Reference]:
    """The meanings of the collectives on one rank, from its communication `ranks`."""

    def of(collective: Any) -> Reference:
        def reference(
            op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
        ) -> Any:
            return collective(op, tensors, attrs, ranks)

        reference.__doc__ = collective.__doc__
        return reference

    return {name: of(collective) for name, (collective, *_) in _COLLECTIVES.items()}


for _name, _reference in meanings(OnlyRank()).items():
    defop(_name, *_COLLECTIVES[_name][1:])(_reference)


def _infer_assign(op: Op) -> tuple[TensorType, ...]:
    ids, first, holders = op.inputs
    require(op, len(ids.shape) == 2, f"{ids} is not [T, k]")
    require(op, len(first.shape) == 1 and len(holders.shape) == 1, f"{first}, {holders}")
    return (ids.type,)


@defop("dist.assign", _infer_assign, "experts, first, slots")
def assign(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """experts[T, k], first i64[E + 1], slots i64[P] -> slot[T, k]: choice s of token t goes to copy
    (t + s) % copies of its expert e, whose copies are in slots[first[e]:first[e + 1]]. Ids of E and
    more become P: no slot."""
    ids, first, slots = tensors
    tokens, k = ids.shape
    experts = len(first) - 1
    chosen = ids.clamp(max=experts - 1)
    copies = (first[1:] - first[:-1])[chosen]
    token, choice = (torch.arange(size, device=ids.device) for size in (tokens, k))
    turn = token[:, None] + choice[None, :]
    slot = slots[first[chosen] + turn % copies]
    return torch.where(ids < experts, slot, len(slots)).to(ids.dtype)


def _infer_first_of(op: Op) -> tuple[TensorType, ...]:
    (keys,) = op.inputs
    require(op, len(keys.shape) == 2, f"{keys} is not [T, k]")
    return (keys.type,)


@defop("dist.first_of", _infer_first_of, "keys")
def first_of(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """keys[T, k] -> [T, k]: each key of a row once; where it repeats an earlier one, `other`."""
    (keys,) = tensors
    equal = keys[:, :, None] == keys[:, None, :]
    return keys.masked_fill(equal.tril(-1).any(-1), attrs["other"])


def _infer_slot_of(op: Op) -> tuple[TensorType, ...]:
    return (TensorType("i64", (canonical(cast(Dim, op.attrs["rows"])),)),)


@defop("dist.slot_of", _infer_slot_of, "ends")
def slot_of(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """ends[P] -> the slot of each of `rows` sorted rows, i64[rows]; P for rows without a slot."""
    (ends,) = tensors
    rows = torch.arange(attrs["rows"], device=ends.device)
    return torch.searchsorted(ends.long(), rows, right=True)


def _infer_row_count(op: Op) -> tuple[TensorType, ...]:
    return (TensorType("i32", (1,)),)


@defop("dist.row_count", _infer_row_count, "x")
def row_count(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x[R, …] -> i32[1]: R."""
    return torch.full((1,), len(tensors[0]), dtype=torch.int32, device=tensors[0].device)


def _infer_counts(op: Op) -> tuple[TensorType, ...]:
    parts = op.attrs["parts"]
    require(op, isinstance(parts, tuple), "names no parts")
    return (TensorType("i32", (len(cast("tuple[int, ...]", parts)),)),)


@defop("dist.counts", _infer_counts, "ends")
def counts(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """ends[P] -> i32[n]: the number of rows in each run of parts[i] consecutive slots."""
    last = torch.tensor(attrs["parts"]).cumsum(0) - 1
    ends = tensors[0].long()[last]
    return torch.diff(ends, prepend=ends.new_zeros(1)).int()
