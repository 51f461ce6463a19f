"""A model of transformers with the weights of a checkpoint, each read when it is converted."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from mmap import MADV_DONTNEED, mmap
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.checkpoint.coverage import check_experts
from moec.checkpoint.paged import large_weights, page
from moec.checkpoint.weight import CheckpointWeight
from moec.dtypes import MODEL_DTYPES
from moec.errors import CaptureError
from moec.memory.budget import budget_of
from moec.memory.memory import Bounded, InMemory
from moec.spelling import did_you_mean

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
