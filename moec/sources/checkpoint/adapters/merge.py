"""Merges adapters into a model that was loaded: in float32, rounded once for each weight.

The names of an adapter are those of the model that it was trained with, in which experts may have
been modules of their own. Such names are those of the checkpoint: their weights are read again, and
converted as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.files.adapter import WEIGHTS, AdapterConfig
from moec.sources.checkpoint.conversion import Conversion, conversion_of
from moec.sources.checkpoint.tensors import Tensors, map_files
from moec.sources.checkpoint.weight import CheckpointWeight, in_few_bits
from moec.sources.memory.memory import InMemory

# What an adapter changes: its tensors as changes of weights [out, in], or of stacks of them.
#
#     LowRank    W + scale * B A;  with a magnitude m (DoRA):  m (W + D) / |W0 + D|, D = scale * B A
#     BiasAdded  b + scale * c, of biases
#     Replaced   another tensor in place of the weight
#
# Here |.| is the norm of each row and W0 the weight without other adapters.

_PART = re.compile(
    r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.(weight|bias))?", re.DOTALL
)


@dataclass(frozen=True)
class LowRank:
    """Factors a [E, r, in] and b [E, out, r], one for each matrix of a stack; `across` where the
    weight is [in, out], as embeddings are."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    across: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [E, .., ..] of what is added."""
        experts, out, _ = self.b.shape
        inner = self.a.shape[2]
        return (experts, inner, out) if self.across else (experts, out, inner)

    def applied(self, value: Tensor, base: Tensor, index: int) -> Tensor:
        delta = self.scale * (self.b[index].float() @ self.a[index].float())
        delta = delta.mT if self.across else delta
        if self.magnitude is None:
            return value + delta
        axis = 0 if self.across else 1
        norm: Tensor = torch.linalg.vector_norm(base + delta, dim=axis, keepdim=True)
        return self.magnitude.float().unsqueeze(axis) / norm * (value + delta)


@dataclass(frozen=True)
class BiasAdded:
    bias: Tensor
    scale: float


@dataclass(frozen=True)
class Replaced:
    tensor: Tensor


Change = LowRank | BiasAdded | Replaced


def changed(weight: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """A weight, a matrix or a stack of them, after changes that fit it."""
    result = torch.empty(weight.shape, dtype=dtype)
    into = _stack(result)
    for index, matrix in enumerate(_stack(weight)):
        value = base = matrix.float()
        for change in changes:
            match change:
                case LowRank():
                    value = change.applied(value, base, index)
                case BiasAdded():
                    value = value + change.scale * change.bias.float()
                case Replaced():
                    value = base = _stack(change.tensor)[index].float()
        into[index] = value
    return result


def _stack(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor[None]


def changes_of(config: AdapterConfig, tensors: Tensors, model: Any) -> Iterator[tuple[str, Change]]:
    """The changes of an adapter by the names of weights, which may be those of a checkpoint.

    Raises CaptureError, naming it, for a tensor that is missing or that does not fit its rank.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in tensors:
        weight = name.removeprefix("base_model.model.")
        if match := _PART.fullmatch(weight):
            part = "bias" if match[3] == "bias" else match[2]
            layers.setdefault(match[1], {})[part] = name
        else:
            # first: the factors of an embedding are for the one that the adapter replaces
            yield weight.replace(".base_layer.", "."), Replaced(tensors.read(name))
    for module, parts in layers.items():
        yield from _layer(config, tensors, model, module, parts)


def _layer(
    config: AdapterConfig, tensors: Tensors, model: Any, module: str, parts: dict[str, str]
) -> Iterator[tuple[str, Change]]:
    """The changes of a module by its factors, whose names `parts` has."""
    embedding = "lora_embedding_A" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    expected = {first, second} | ({"lora_magnitude_vector"} if config.fields.use_dora else set())
    present = parts.keys() - {"bias"}
    if present != expected:
        name = min(present ^ expected)
        verb = "has" if name in present else "lacks"
        raise CaptureError(
            f"the adapter {config.folder} {verb} {name} of {module}, and use_dora is "
            f"{str(config.fields.use_dora).lower()}: copy it again from its source"
        )
    weight = _weight(config, model, module)
    # patterns are for modules, but for a parameter that is adapted itself for its name
    name = weight if _is_adapted(config, weight) else module
    rank, scale = config.rank_of(name), config.scale_of(name)
    a, b = tensors.read(parts[first]), tensors.read(parts[second])
    magnitude = tensors.read(parts["lora_magnitude_vector"]) if config.fields.use_dora else None
    matrices = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0
    magnitudes = magnitude is None or (magnitude.shape == b.shape[:1] and len(a) == rank)
    if not matrices or not magnitudes:
        shapes = ", ".join(str(list(tensors.shape(parts[part]))) for part in sorted(expected))
        raise CaptureError(
            f"the adapter {config.folder} has tensors {shapes} for {module}, no factors of rank "
            f"{rank}: copy it again from its source"
        )
    # PEFT stores the factors of a stack as [E * r, in] and [out, r * E]
    stacked = a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1)
    yield weight, LowRank(*stacked, scale, magnitude, across=embedding)
    if "bias" in parts:
        yield f"{module}.bias", BiasAdded(tensors.read(parts["bias"]), scale)


def _is_adapted(config: AdapterConfig, weight: str) -> bool:
    """Whether a weight is adapted as a parameter, not as that of its module."""
    return any(f".{weight}".endswith(f".{end}") for end in config.fields.target_parameters or ())


def _weight(config: AdapterConfig, model: Any, module: str) -> str:
    """The name of the weight that a module's factors change.

    PEFT wraps a module once for each of its parameters that it adapts, in their order: the last one
    has the name of the module, the one before it that name with `.base_layer`, and so on.
    """
    stem = module
    while stem.endswith(".base_layer"):
        stem = stem.removesuffix(".base_layer")
    depth = module.count(".base_layer")
    try:
        parameters = model.get_submodule(stem).named_parameters(recurse=False)
    except AttributeError:  # a module of the checkpoint
        parameters = ()
    adapted = [f"{stem}.{n}" for n, _ in parameters if _is_adapted(config, f"{stem}.{n}")]
    if len(adapted) > depth:
        return adapted[-1 - depth]
    if depth:
        raise CaptureError(
            f"the adapter {config.folder} has tensors of {module}, and target_parameters names "
            f"{len(adapted)} parameters of {stem}"
        )
    return f"{stem}.weight"


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
