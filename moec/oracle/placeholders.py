"""Ids of texts with placeholders, which a model counts.

A text with images has a run of equal ids for each image, as long as the image has features, and the
model refuses any other number. Where random ids are refused, runs keep their places and only the
other ids are random.
"""

from __future__ import annotations

import torch


def with_runs(example: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`ids`, with the runs of equal ids in `example`, and without their ids elsewhere; `ids` alone
    where the example has no runs, or nothing else."""
    runs = _runs(example) if example.ndim else torch.zeros((), dtype=torch.bool)
    if not runs.any() or runs.all():
        return ids
    plain = example[~runs]
    free = torch.isin(ids, example[runs], invert=True)
    return torch.where(runs, example, torch.where(free, ids, plain[0]))


def _runs(ids: torch.Tensor) -> torch.Tensor:
    """Which ids equal a neighbour in the last axis."""
    equal = torch.zeros(ids.shape, dtype=torch.bool)
    same = ids[..., 1:] == ids[..., :-1]
    equal[..., 1:] |= same
    equal[..., :-1] |= same
    return equal
