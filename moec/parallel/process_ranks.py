"""The ranks of a plan as processes: their devices, and exchanges by torch.distributed, with names
for errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moec.errors import MoecError, TargetError, UsageError
from moec.ir.graph import Op
from moec.ir.interpret.ranks import Groups
from moec.ir.opdef import Reference, Runner
from moec.ir.ops.parallel.dist import meanings
from moec.runtime.device.device import CUDA, Cpu, Device, device_of

LATE = "another rank did not respond in time"
ENDED = "another rank ended"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""How ranks exchange tensors, by torch's name of the device on which the tensors are."""


class RankError(MoecError):
    """A rank ended, or an exchange failed. The message has rank, layer and collective."""


def device_of_rank(target: str) -> Device:
    """The device on which this process runs code for `target`: the CPU, or the GPU of torchrun's
    LOCAL_RANK.

    Nothing else chooses how ranks exchange rows: `BACKENDS` has it for the tensors that the device
    takes. A test without GPUs replaces this function by one that returns an emulated GPU, whose
    tensors are on the CPU. Raises UsageError where torchrun did not start this process, and
    TargetError where the host has too few GPUs, or torch has no NCCL.
    """
    if not target.startswith(CUDA):
        return Cpu()
    try:
        index = int(os.environ["LOCAL_RANK"])
    except KeyError:
        raise UsageError(
            "LOCAL_RANK, the number of a rank's GPU, is not set: start the ranks with torchrun"
        ) from None
    if not dist.is_nccl_available():
        raise TargetError(
            f"the ranks are compiled for {target} and exchange rows by NCCL, which this build of "
            "torch lacks: install torch for CUDA, or compile the plan for CPUs"
        )
    if index >= (count := torch.cuda.device_count()):
        raise TargetError(
            f"there is no GPU {index}: each rank of a host needs one, and this one has {count}"
        )
    return device_of(f"{CUDA}:{index}")


def start_group(device: Device, timeout: timedelta) -> None:
    """Starts torch.distributed for exchanges between devices like this one."""
    on = torch.device(device.takes)
    gpu = on if on.type == CUDA else None
    if gpu is not None:
        torch.cuda.set_device(gpu)  # where torch sends objects by NCCL
    dist.init_process_group(BACKENDS[on.type], timeout=timeout, device_id=gpu)


class ProcessRanks:
    """This process among the ranks, with its device. All ranks create the groups once, in the same
    order, each with its own time-out `patience`, which torch does not copy from the first group."""

    def __init__(
        self, rank: int, groups: Groups, patience: timedelta, device: Device | None = None
    ) -> None:
        self.rank, self.device = rank, device or Cpu()
        self.members: dict[str, tuple[int, ...]] = {}
        self.handles: dict[tuple[int, ...], Any] = {}
        for name in sorted(groups):
            for part in map(tuple, groups[name]):
                if len(part) > 1 and part not in self.handles:
                    self.handles[part] = dist.new_group(list(part), timeout=patience)
                if rank in part:
                    self.members[name] = part

    def size(self, group: str) -> int:
        return len(self.members[group])

    def position(self, group: str) -> int:
        return self.members[group].index(self.rank)

    def exchange(
        self, group: str, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> torch.Tensor:
        part = self.members[group]
        rows = rows[: sum(send)].contiguous()
        if len(part) == 1:
            return rows
        result = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(result, rows, list(receive), list(send), self.handles[part])
        return result

    def gather(self, group: str, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks in their order; rank i has counts[i] of them."""
        size = self.size(group)
        return self.exchange(group, torch.cat([rows] * size), [len(rows)] * size, counts)

    def sum(self, group: str, x: torch.Tensor) -> torch.Tensor:
        """The sum in float32, in the order of the ranks, so that every rank has the same bits."""
        count = self.size(group)
        rows = x.reshape(1, *x.shape)
        parts = self.exchange(group, torch.cat([rows] * count), [1] * count, [1] * count)
        return parts.float().sum(0).to(x.dtype)


def named_meanings(ranks: ProcessRanks) -> Mapping[str, Reference]:
    """The collectives between processes; one that fails raises RankError with its layer."""

    def named(reference: Reference) -> Reference:
        def run(
            op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], runner: Runner
        ) -> Any:
            where = op.origin.removesuffix(".experts") or "the model"
            with as_rank_errors(ranks, f"layer {where}", f"{op.name} over {op.attrs['group']}"):
                return reference(op, tensors, attrs, runner)

        return run

    return {name: named(reference) for name, reference in meanings(ranks).items()}


@contextmanager
def as_rank_errors(ranks: ProcessRanks, where: str, collective: str) -> Iterator[None]:
    """While open, a RuntimeError or MemoryError becomes a RankError with rank, layer and
    collective."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise RankError(f"rank {ranks.rank}, {where}, {collective}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The message of gloo or torch in plain words."""
    text = str(error)
    if "can't allocate memory" in text or isinstance(error, MemoryError):
        size = re.search(r"allocate (\d+) bytes", text)
        return "too little memory" + (f" for {int(size[1]) / 1e9:.1f} GB more" if size else "")
    if "EADDRINUSE" in text:
        port = re.search(r"port: (\d+)", text)
        return f"port {port[1] if port else ''} is in use: choose another (--master-port)"
    if joined := re.search(r"(\d+)/(\d+) clients joined", text):
        return f"{LATE}: {joined[1]} of {joined[2]} were started"
    if "Timed out" in text or "timed out" in text.lower():
        return LATE
    if "Connection closed" in text or "Connection reset" in text or "Broken pipe" in text:
        return ENDED
    return " ".join(text.split())[:200]
