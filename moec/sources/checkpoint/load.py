"""A model of transformers with the weights of a checkpoint, each read when it is converted."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from mmap import MADV_DONTNEED, mmap
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moec.dtypes import MODEL_DTYPES
from moec.errors import CaptureError
from moec.sources.checkpoint.conversion import Conversion, Group, conversion_of
from moec.sources.checkpoint.weight import CheckpointWeight
from moec.sources.memory.budget import budget_of
from moec.sources.memory.memory import Bounded, InMemory
from moec.sources.memory.paged import PagedWeights
from moec.spelling import did_you_mean

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


MOST_MISSING = 1 << 27
_LEAST_STORED = 0.75
"""The part of the weights that a temporary file holds at least: codes of 8 bits, and packed."""


@dataclass(frozen=True)
class _Lazy:
    """A weight as transformers takes it: its values are read by `[...]`, and `copied` if the file
    will not stay in memory."""

    name: str
    weight: CheckpointWeight
    copied: bool

    def __getitem__(self, index: Any) -> Tensor:
        values = self.weight.values()
        if values.shape != self.weight.shape:
            raise CaptureError(
                f"the weight {self.name} is {list(values.shape)}, not {list(self.weight.shape)}"
            )
        # codes are views of weights in the order of memory
        return values[index].clone() if self.copied else values[index].contiguous()


def load_model(
    auto: Any,
    config: Any,
    weights: Mapping[str, CheckpointWeight],
    files: Collection[mmap],
    limit: int,
) -> tuple[Any, Mapping[str, Any], InMemory]:
    """The model of a configuration, what transformers says of loading it, and where its weights
    are: in memory, if a compilation of them fits into `limit` bytes; otherwise large ones are read
    from these `files` when they are needed.

    Raises CaptureError where experts are missing or a weight cannot be read, and UsageError where
    the limit cannot be kept.
    """
    check_experts(weights)
    model_class, config = _class_of(auto, config)
    empty = empty_model(auto, config)
    _check_size(empty, weights)
    memory = _memory_for(empty, weights, files, limit)
    paged = memory.paged
    state: dict[str, Any] = {n: _Lazy(n, w, paged is not None) for n, w in weights.items()}
    model, loading = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state if paged is None else state | large_weights(empty, weights),
        dtype=_dtype(config, weights),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are named by check_loading
    )
    if paged is not None:
        page(model, weights, paged)
    for file in files:
        file.madvise(MADV_DONTNEED)
    return model, loading, memory


def empty_model(auto: Any, config: Any) -> Any:
    """The model of a configuration, with tensors that have no values."""
    model_class, config = _class_of(auto, config)
    with torch.device("meta"):
        return model_class(config)


def _memory_for(
    empty: Any, weights: Mapping[str, CheckpointWeight], files: Iterable[mmap], limit: int
) -> InMemory:
    """Where the weights of a checkpoint in these `files` are while it is compiled."""
    sizes = [2 if weight.dtype is None else weight.dtype.itemsize for weight in weights.values()]
    counts = [math.prod(weight.shape) for weight in weights.values()]
    size = sum(map(mul, sizes, counts))
    item = max(2, round(size / max(1, sum(counts))))
    budget = budget_of(limit, [(tuple(p.shape), item) for p in empty.parameters()])
    budget.check()
    if budget.holds(size):
        return InMemory()
    bounded = Bounded(budget)
    bounded.check_room(_LEAST_STORED * size)
    bounded.paged.files.extend(files)
    return bounded


def _check_size(empty: Any, weights: Mapping[str, CheckpointWeight]) -> None:
    """Raises CaptureError where transformers would fill more than `MOST_MISSING` numbers that the
    checkpoint lacks: a small file with the configuration of a large model ends in memory."""
    needed = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    stored = sum(math.prod(weight.shape) for weight in weights.values())
    if needed - stored > MOST_MISSING:
        raise CaptureError(
            f"config.json makes a model of {needed:,} numbers, and the weights next to it hold "
            f"{stored:,}: they are of different models"
        )


def _class_of(auto: Any, config: Any) -> tuple[Any, Any]:
    """The class that an Auto class chooses for a configuration, and the part of it that is the
    language model's where the class is one. (The Auto classes themselves take only paths.)"""
    from transformers.models.auto.auto_factory import _get_model_class

    model_class = _get_model_class(config, auto._model_mapping)
    text = config.sub_configs.get("text_config")
    of_text = text is not None and getattr(model_class, "config_class", None) == text
    return model_class, config.get_text_config() if of_text else config


def _dtype(config: Any, weights: Mapping[str, CheckpointWeight]) -> torch.dtype | str:
    """The dtype of the model: that of its configuration, else of its first floating weight."""
    if getattr(config, "dtype", None) is not None:
        return "auto"
    stored = (weight.dtype for weight in weights.values())
    return next((d for d in stored if d is not None and d.is_floating_point), torch.bfloat16)


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CaptureError for a model type that transformers lacks or a dtype that torch lacks."""
    import transformers

    model = config.get("model_type")
    if not isinstance(model, str) or model not in transformers.CONFIG_MAPPING:
        near = did_you_mean(str(model), transformers.CONFIG_MAPPING)
        raise CaptureError(
            f"{path}: transformers {transformers.__version__} knows no model_type "
            f"{str(model)[:40]!r}{near}"
        )
    dtype = config.get("dtype", config.get("torch_dtype"))
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if name not in (None, "auto") and not isinstance(getattr(torch, str(name), None), torch.dtype):
        near = did_you_mean(str(name), MODEL_DTYPES)
        raise CaptureError(f"{path}: the dtype {dtype!r} is not one of torch's{near}")


_EXPERT = re.compile(r"(.*\bexperts\.)(\d+)(\..*)")


def check_experts(names: Collection[str]) -> None:
    """Raises CaptureError where the experts of a layer are not 0 .. E - 1, each with all weights
    that others have: transformers would stack those that are there."""
    present: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            stem, expert, part = match.groups()
            present.setdefault(stem, {}).setdefault(int(expert), set()).add(part)
    for stem, experts in present.items():
        parts = set().union(*experts.values())
        for expert in range(len(experts)):
            for part in sorted(parts - experts.get(expert, set())):
                raise CaptureError(
                    f"the checkpoint lacks {stem}{expert}{part}, which other experts have"
                )


def check_loading(where: str, loading: Mapping[str, Any], images: bool) -> None:
    """Raises CaptureError, naming the first, where weights are missing, have other shapes than the
    configuration, or are read by nothing: transformers would fill or skip them.

    With `images`, tensors that the language model does not read belong to the rest of the model.
    """
    others = sorted(loading["mismatched_keys"])
    if others:
        name, stored, expected = others[0]
        raise CaptureError(
            f"{where}: the weight {name} is {list(stored)}, and config.json makes it "
            f"{list(expected)}{_more(others, ' differ too')}: they are of different models"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CaptureError(
            f"{where} lacks the weight {missing[0]}{_more(missing)}: config.json is of another "
            "model, or a .safetensors is missing"
        )
    unread = sorted(loading["unexpected_keys"])
    if unread and not images:
        raise CaptureError(
            f"{where} holds {unread[0]}{_more(unread)}, which no weight of the model reads: "
            "config.json is of another model, or transformers is too old for it"
        )


def _more(names: Collection[Any], verb: str = "") -> str:
    count = len(names) - 1
    return f", and {count} other{'s' if count > 1 else ''}{verb}" if count else ""
