"""Merges adapters into a model that was loaded: in float32, rounded once for each weight.

The names of an adapter are those of the model that it was trained with, in which experts may have
been modules of their own. Such names are those of the checkpoint: their weights are read again, and
converted as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.checkpoint.adapters.changes import (
    BiasAdded,
    Change,
    LowRank,
    Replaced,
    changed,
    changes_of,
)
from moec.checkpoint.conversion import Conversion, conversion_of
from moec.checkpoint.tensors import map_files
from moec.checkpoint.weight import CheckpointWeight, in_few_bits
from moec.errors import CaptureError
from moec.files.adapter import WEIGHTS, AdapterConfig
from moec.memory.memory import InMemory


@dataclass(frozen=True)
class MergedAdapters:
    """The weights of the model that adapters changed, and what a report says of it."""

    names: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """Changes in order: of weights of the model, and of weights of the checkpoint by the weight of
    the model that they are a part of."""

    conversion: Conversion
    weights: Mapping[str, CheckpointWeight]
    direct: dict[str, list[Change]]
    parts: dict[str, dict[str, list[Change]]]


def merge_adapters(
    model: Any,
    weights: Mapping[str, CheckpointWeight],
    adapters: Sequence[AdapterConfig],
    memory: InMemory,
) -> MergedAdapters:
    """Change the model, which was loaded from `weights` into `memory`, by the adapters in order.

    Raises CaptureError, naming it, for a tensor of an adapter that fits no weight of the model.
    """
    if not adapters:
        return MergedAdapters()
    plan = _Plan(conversion_of(model), weights, {}, {})
    notes = [f"adapter {config.name}: {_add(plan, config)}" for config in adapters]
    coded = any(map(in_few_bits, weights.values()))
    groups = plan.conversion.groups(weights) if plan.parts or coded else {}
    names = set(plan.direct)
    with memory.reading():
        for target, parts in plan.parts.items():
            # rounded here, unless changes of the weight itself follow
            dtype = torch.float32 if target in plan.direct else plan.conversion.state[target].dtype
            tensors = [
                changed(weights[name].values(), parts.get(name, ()), dtype)
                for _, name in groups[target]
            ]
            for name, tensor in plan.conversion.convert(target, groups[target], tensors).items():
                _assign(model, name, memory.tensor(tensor))
                names.add(name)
        state = model.state_dict()
        for name, changes in plan.direct.items():
            tensor = changed(state.pop(name), changes, plan.conversion.state[name].dtype)
            _assign(model, name, memory.tensor(tensor))
    lost = sum(any(in_few_bits(weights[n]) for _, n in groups.get(name, ())) for name in names)
    if lost:
        kind = str(model.dtype).removeprefix("torch.")
        notes.append(f"of these, {lost} lose the codes of the checkpoint, and are stored as {kind}")
    return MergedAdapters(frozenset(names), tuple(notes))


def _add(plan: _Plan, config: AdapterConfig) -> str:
    """Adds the changes of an adapter, and says how many weights it changes."""
    names = set()
    tensors = map_files([config.folder / WEIGHTS])
    for name, change in changes_of(config, tensors, plan.conversion.model):
        target, pattern = plan.conversion.target(name)
        part = pattern is not None and name in plan.weights
        if not part and (pattern is not None or target not in plan.conversion.state):
            raise CaptureError(
                f"the adapter {config.folder} changes {name}, which the model does not have: it is "
                "for another model, or for another version of it"
            )
        weight = name if part else target
        change = _fitted(plan, config, weight, part, change)
        of_target = plan.parts.setdefault(target, {}) if part else plan.direct
        changes = of_target.setdefault(weight, [])
        if isinstance(change, Replaced) and changes:
            raise CaptureError(
                f"the adapter {config.folder} replaces {name}, which another adapter changes: a "
                "model can have one of them"
            )
        changes.append(change)
        names.add(name)
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} changed"


def _fitted(plan: _Plan, config: AdapterConfig, name: str, part: bool, change: Change) -> Change:
    """The change in the orientation of its weight. Raises CaptureError for another shape."""
    from transformers.pytorch_utils import Conv1D

    shape = tuple(plan.weights[name].shape if part else plan.conversion.state[name].shape)
    match change:
        case LowRank():
            module = None if part else plan.conversion.model.get_submodule(name.rpartition(".")[0])
            stacked = len(shape) == 3 and getattr(module, "is_transposed", False)
            change = replace(change, across=change.across or stacked or isinstance(module, Conv1D))
            expected = change.shape if len(shape) == 3 else change.shape[change.shape[0] == 1 :]
        case BiasAdded():
            expected = tuple(change.bias.shape)
        case Replaced():
            expected = tuple(change.tensor.shape)
    if expected != shape:
        raise CaptureError(
            f"the adapter {config.folder} changes {name} as {list(expected)}, and the model's is "
            f"{list(shape)}: it is for another model"
        )
    return change


def _assign(model: Any, name: str, tensor: Tensor) -> None:
    """Gives a weight its values: it alone, where others have been tied to it."""
    module, _, leaf = name.rpartition(".")
    owner = model.get_submodule(module)
    parameter = dict(owner.named_parameters(recurse=False, remove_duplicate=False)).get(leaf)
    if parameter is not None:
        tensor = torch.nn.Parameter(tensor, parameter.requires_grad)
    setattr(owner, leaf, tensor)
