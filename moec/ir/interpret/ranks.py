"""Evaluates the programs of several ranks in one process, one thread each: a plan's meaning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from moec.errors import IRError
from moec.ir.graph import Module
from moec.ir.interpret.evaluate import run_graph
from moec.ir.opdef import Reference
from moec.ir.ops.parallel.dist import meanings

Groups = Mapping[str, Sequence[Sequence[int]]]
"""The ranks of each group by name: parts of 0..p-1, in the order that the collectives keep."""
_PATIENCE = 60.0
T = TypeVar("T")


@dataclass
class _Meeting:
    """The shared memory of the ranks of one group, for the rows that they send."""

    barrier: threading.Barrier
    rows: dict[int, tuple[torch.Tensor, Sequence[int]]] = field(default_factory=dict)


class _SimulatedRank:
    def __init__(self, rank: int, groups: Groups, meetings: Mapping[tuple[int, ...], _Meeting]):
        self.rank, self.groups, self.meetings = rank, groups, meetings

    def _members(self, group: str) -> tuple[int, ...]:
        for part in self.groups.get(group, ()):
            if self.rank in part:
                return tuple(part)
        raise IRError(f"rank {self.rank} is in no group {group}")

    def size(self, group: str) -> int:
        return len(self._members(group))

    def position(self, group: str) -> int:
        return self._members(group).index(self.rank)

    def exchange(
        self, group: str, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        members = self._members(group)
        own_index = self.position(group)
        if len(send) != len(members):
            raise IRError(f"{len(send)} counts for the {len(members)} ranks of group {group}")
        meeting = self.meetings[members]
        meeting.rows[self.rank] = rows, send
        meeting.barrier.wait(_PATIENCE)
        parts = []
        for index, other in enumerate(members):
            sent, count = meeting.rows[other]
            start = sum(count[:own_index])
            parts.append(sent[start : start + count[own_index]])
            if len(parts[-1]) != receive[index]:
                raise IRError(
                    f"rank {self.rank} expects {receive[index]} rows from rank {other} in group "
                    f"{group}, {len(parts[-1])} were sent"
                )
        result = torch.cat(parts)
        meeting.barrier.wait(_PATIENCE)
        return result

    def sum(self, group: str, x: torch.Tensor) -> torch.Tensor:
        count = self.size(group)
        rows = x.reshape(1, *x.shape)
        parts = self.exchange(group, torch.cat([rows] * count), [1] * count, [1] * count)
        return parts.float().sum(0).to(x.dtype)


def evaluate_ranks(
    module: Module,
    inputs: Sequence[Sequence[torch.Tensor]],
    groups: Groups,
    function: str = "main",
) -> list[tuple[torch.Tensor, ...]]:
    """The results of `rank.N.main`, or another function, for every rank N, run side by side on
    `inputs[N]`.

    Raises IRError for counts that two ranks disagree about, or what the first rank to fail raises.
    """

    def run(rank: int, table: Mapping[str, Reference]) -> tuple[torch.Tensor, ...]:
        program = module[f"rank.{rank}.{function}"]
        tensors = [*inputs[rank], *(program.weights[p.name] for p in program.graph.params)]
        return run_graph(program.graph, tensors, meanings=table)

    return side_by_side(len(inputs), groups, run)


def side_by_side(
    count: int, groups: Groups, run: Callable[[int, Mapping[str, Reference]], T]
) -> list[T]:
    """run(rank, the meanings of its collectives) of every rank, each in a thread.

    Raises IRError for counts that two ranks disagree about, or what the first rank to fail raises.
    """
    meetings = {
        tuple(part): _Meeting(threading.Barrier(len(part)))
        for parts in groups.values()
        for part in parts
    }
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run_rank(rank: int) -> None:
        try:
            with torch.no_grad():
                results[rank] = run(rank, meanings(_SimulatedRank(rank, groups, meetings)))
        except threading.BrokenBarrierError:
            pass  # another rank failed first, and its error is the one to show
        except BaseException as error:
            errors.append(error)
            for meeting in meetings.values():
                meeting.barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if len(results) < count:
        missing = sorted(set(range(count)) - set(results))
        raise IRError(f"ranks {missing} waited for others that never came")
    return [results[rank] for rank in range(count)]
