"""One rank of `moec run`: runs on its part of the inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from moec.errors import SetupError
from moec.parallel.process import Job, joined
from moec.parallel.process_ranks import ProcessRanks, named_meanings
from moec.parallel.segments import RankModel
from moec.parallel.store import RankFiles
from moec.plan.groups import WORLD
from moec.runtime.arrays.tensor_files import write_tensors


def run_rank(job: Job) -> dict[str, list[int]]:
    """Run this process's rank on its share of `source`; returns the outputs' shapes on rank 0.

    Raises RankError, naming rank, layer and collective, ArtifactError and UsageError.
    """
    with joined(job) as (ranks, files):
        outputs = outputs_of(job, ranks, files)
        if ranks.rank == 0 and job.output is not None:
            arrays = {n: t.float().numpy() if t.dtype is torch.bfloat16 else t.numpy()
                      for n, t in outputs.items()}  # fmt: skip
            write_tensors(job.output, arrays)
        return {n: list(t.shape) for n, t in outputs.items()} if ranks.rank == 0 else {}


def outputs_of(job: Job, ranks: ProcessRanks, files: RankFiles) -> dict[str, torch.Tensor]:
    """All outputs of the job on rank 0, and no rows on the others. Raises RankError and
    UsageError."""
    graph = files.code.graph
    model = RankModel(files.code, ranks.device)
    results = model(_inputs(job, [v.name for v in graph.inputs], ranks), named_meanings(ranks))
    named = zip(graph.outputs, results, strict=True)
    return {value.name: _on_first(ranks, tensor) for value, tensor in named}


def _inputs(job: Job, names: list[str], ranks: ProcessRanks) -> list[torch.Tensor]:
    """This rank's share of every input along its first axis, on its device. Raises UsageError."""
    source, world = job.source, ranks.size(WORLD)
    assert source is not None
    try:
        with np.load(source, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file}
    except (OSError, ValueError) as error:
        raise SetupError(f"{source}: {error}") from None
    missing = [name for name in names if name not in arrays]
    if missing:
        raise SetupError(f"{source} lacks {', '.join(missing)}; the model takes {', '.join(names)}")
    lengths = {arrays[name].shape[:1] for name in names}
    if len(lengths) != 1 or lengths == {()}:
        raise SetupError(
            f"{source}: inputs have different first axes, which are split over the ranks: give "
            "inputs of one batch size"
        )
    shares = (np.array_split(arrays[name], world)[ranks.rank] for name in names)
    return [torch.from_numpy(share).to(ranks.device.takes) for share in shares]


def _on_first(ranks: ProcessRanks, tensor: torch.Tensor) -> torch.Tensor:
    """All ranks' rows in memory of the CPU on rank 0, no rows on the others."""
    ones = [1] * ranks.size(WORLD)
    send = [len(tensor), *(0 for _ in ones[1:])]
    arriving = ranks.exchange(WORLD, torch.tensor(send, device=tensor.device), ones, ones).tolist()
    return ranks.exchange(WORLD, tensor, send, arriving).cpu()
