"""A model of transformers whose large weights are read from the checkpoint when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moec.checkpoint.conversion import Conversion, Group, conversion_of
from moec.checkpoint.weight import CheckpointWeight
from moec.errors import CaptureError
from moec.memory.paged import PagedWeights

LEAST = 1 << 20
"""Smaller weights, in bytes, are read at once."""


@dataclass(frozen=True)
class ReadLater:
    """A weight of a checkpoint as transformers takes it: a shape, without values."""

    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> ReadLater:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Without values, whatever the device: transformers names the CPU."""
        return torch.empty(self.shape, dtype=dtype, device="meta")


def large_weights(model: Any, weights: Mapping[str, CheckpointWeight]) -> dict[str, ReadLater]:
    """The weights of a checkpoint that make large weights of the model, which has no values."""
    large = {name for name, weight in model.named_parameters() if weight.nbytes >= LEAST}
    later: dict[str, ReadLater] = {}
    for part in _parts(model, weights):
        if part.name in large:
            later |= {name: ReadLater(weights[name].shape) for _, name in part.group}
    return later


def page(model: Any, weights: Mapping[str, CheckpointWeight], paged: PagedWeights) -> None:
    """Give a paged weight to the model for each one without values."""
    parameters = dict(model.named_parameters())
    pages: dict[int, Parameter] = {}
    for part in _parts(model, weights):
        weight = parameters.get(part.name)
        if weight is None or not weight.is_meta or id(weight) in pages:
            continue
        runs = _runs(part, weight.shape)
        read = partial(_convert, part) if runs is None else partial(_copy, part.sources, runs)
        tensor = paged.add(weight.shape, weight.dtype, read)
        pages[id(weight)] = Parameter(tensor, requires_grad=weight.requires_grad)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(weight) in pages:  # tied weights stay one
                setattr(module, name, pages[id(weight)])


@dataclass(frozen=True)
class _Part:
    """The weight `name` of a model, and the `sources` that are converted to it."""

    name: str
    conversion: Conversion
    target: str
    group: Group
    sources: tuple[CheckpointWeight, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The weight, from the tensors of the sources."""
        return self.conversion.convert(self.target, self.group, tensors)[self.name]


def _parts(model: Any, weights: Mapping[str, CheckpointWeight]) -> Iterator[_Part]:
    """The weights of the model that may be read later."""
    conversion = conversion_of(model)
    for target, group in conversion.groups(weights).items():
        sources = tuple(weights[name] for _, name in group)
        empty = [torch.empty(source.shape, device="meta") for source in sources]
        if not conversion.needs_values(group):
            for name in conversion.convert(target, group, empty):
                yield _Part(name, conversion, target, group, sources)


def _convert(part: _Part, tensor: Tensor) -> None:
    """Writes a weight of the model. Raises CaptureError for another shape."""
    values = part.of([source.values() for source in part.sources])
    if values.shape != tensor.shape:
        raise CaptureError(
            f"the weight {part.name} is {list(values.shape)}, not {list(tensor.shape)}"
        )
    tensor.copy_(values)


@dataclass(frozen=True)
class _Run:
    """Rows [start, start + count) of a weight of the model: those of a source from `first`."""

    start: int
    source: int
    first: int
    count: int


def _copy(sources: Sequence[CheckpointWeight], runs: Sequence[_Run], tensor: Tensor) -> None:
    """Writes a weight of the model, of which each row is a row of a source."""
    rows, number = tensor.flatten(0, -2), -1
    for run in runs:
        if run.source != number:
            number = run.source
            values = sources[number].values().flatten(0, -2)
        rows[run.start : run.start + run.count] = values[run.first : run.first + run.count]


def _runs(part: _Part, shape: torch.Size) -> list[_Run] | None:
    """The rows of a weight of the model where the conversion moves rows and does nothing else. It
    is tried with the numbers of the rows, and with drawn values."""
    shapes = [source.shape for source in part.sources]
    if len(shape) < 2 or any(len(s) < 2 or s[-1] != shape[-1] for s in shapes):
        return None
    counts = [prod(s[:-1]) for s in shapes]
    stops = torch.tensor(counts).cumsum(0)
    numbers = torch.split(torch.arange(int(stops[-1])), counts)
    moved = _tried(part, [n.view(*s[:-1], 1) for n, s in zip(numbers, shapes, strict=True)])
    if moved is None or moved.shape != (*shape[:-1], 1) or moved.dtype != torch.int64:
        return None
    rows = moved.flatten()
    values = torch.rand(int(stops[-1]), 2, generator=torch.Generator().manual_seed(0))
    drawn = torch.split(values, counts)
    tried = _tried(part, [d.view(*s[:-1], 2) for d, s in zip(drawn, shapes, strict=True)])
    if tried is None or not torch.equal(tried.flatten(0, -2), values[rows]):
        return None
    return list(_grouped(rows, stops))


def _tried(part: _Part, tensors: Sequence[Tensor]) -> Tensor | None:
    """The weight, from tensors with other rows; None for a conversion that needs whole ones."""
    try:
        return part.of(tensors)
    except Exception:  # whatever transformers raises: the rows are converted as they are then
        return None


def _grouped(rows: Tensor, stops: Tensor) -> Iterator[_Run]:
    """The rows as runs of adjacent ones of one source; sources end at `stops`."""
    owners = torch.searchsorted(stops, rows, right=True)
    breaks = (rows.diff() != 1) | (owners.diff() != 0)
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(rows)]
    for start, stop in pairwise(starts):
        owner = int(owners[start])
        before = int(stops[owner - 1]) if owner else 0
        yield _Run(start, owner, int(rows[start]) - before, stop - start)
