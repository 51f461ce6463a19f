"""Builds a Hugging Face model of the same class with fewer experts.

Which tensors have an axis of experts is found from the class: their shapes change when the number
of experts in the configuration does. No model family needs its own code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moec.errors import NoMatch
from moec.ir.graph import Value
from moec.passes.calibration.evaluator import ExpertLineage
from moec.passes.core.moe_layer import Layer

COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
)
"""The names by which configurations have the number of experts of a layer."""


def resize_experts(model: Any, lineages: Mapping[Value, ExpertLineage]) -> nn.Module:
    """A copy of the model with only the experts that `lineages` names.

    Raises NoMatch where experts are merged or new, where layers keep different numbers of experts,
    or where the class has other tensors than the model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "save_pretrained"):
        raise NoMatch("it is not a model of transformers")
    if getattr(model, "config", None) is None:
        raise NoMatch(f"{type(model).__name__} has no configuration")
    kept_experts = {t.layer.name: _experts_left(t) for t in lineages.values()}
    before = {t.layer.count for t in lineages.values() if isinstance(t.layer, Layer)}
    after = {len(experts) for experts in kept_experts.values()}
    if len(before) > 1 or len(after) > 1:
        raise NoMatch(
            f"its layers have {_numbers(after)} experts left of {_numbers(before)}, and the "
            "configuration has one number for all"
        )
    if before == after:
        raise NoMatch("no layer was changed")
    config = _recounted(model.config, before.pop(), after.pop())
    with torch.device("meta"):
        module: nn.Module = type(model)(config)
    _fill(module, model, kept_experts)
    module.train(model.training)
    if (generation := getattr(model, "generation_config", None)) is not None:
        module.generation_config = copy.deepcopy(generation)
    return module


def _experts_left(lineage: ExpertLineage) -> list[int]:
    name, members = lineage.layer.name, lineage.members
    if not isinstance(lineage.layer, Layer):
        raise NoMatch(f"{name} was dense, and its class has no experts in this layer")
    if members is None:
        raise NoMatch(f"{name} has lost its router")
    if any(len(sources) != 1 for sources in members):
        raise NoMatch(f"{name} routes to experts that are several of the model's")
    return [sources[0] for sources in members]


def _numbers(counts: set[int]) -> str:
    return ", ".join(map(str, sorted(counts)))


def _recounted(config: Any, before: int, after: int) -> Any:
    """A copy of the configuration with `after` instead of `before` experts."""
    config = copy.deepcopy(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = [name for name in COUNTS if getattr(text, name, None) == before]
    if not names:
        raise NoMatch(f"its configuration has none of {', '.join(COUNTS)} that is {before}")
    for name in names:
        setattr(text, name, after)
    return config


def _fill(smaller: nn.Module, model: nn.Module, kept_experts: Mapping[str, Sequence[int]]) -> None:
    """Copies the model's tensors into `smaller`, with only the kept experts along their axes."""
    shapes = {name: tensor.shape for name, tensor in _tensors(smaller).items()}
    held = _tensors(model)
    if set(held) != set(shapes):
        odd = sorted(set(held) ^ set(shapes))[0]
        raise NoMatch(f"its class and the model differ in {odd}")
    for name, tensor in held.items():
        cut = _cut(name, tensor.detach(), shapes[name], kept_experts)
        owner, _, last = name.rpartition(".")
        module = smaller.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(cut, requires_grad=tensor.requires_grad))
        else:
            setattr(module, last, cut)
    smaller.tie_weights()  # type: ignore[operator]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cut(
    name: str, tensor: torch.Tensor, shape: torch.Size, kept_experts: Mapping[str, Sequence[int]]
) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor.clone()
    layer = next(
        (layer_name for layer_name in kept_experts if name.startswith(f"{layer_name}.")), None
    )
    if layer is None:
        raise NoMatch(f"{name} has an axis of experts, and belongs to no layer of the graph")
    if tensor.ndim != len(shape):
        raise NoMatch(f"{name} is {list(tensor.shape)}, and {list(shape)} with fewer experts")
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old != new:
            if new != len(kept_experts[layer]):
                raise NoMatch(
                    f"{name} is {list(tensor.shape)}, and {list(shape)} with fewer experts"
                )
            tensor = tensor.index_select(axis, torch.tensor(kept_experts[layer]))
    return tensor
