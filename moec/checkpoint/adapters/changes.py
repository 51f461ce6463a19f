"""What an adapter changes: its tensors as changes of weights [out, in], or of stacks of them.

    LowRank    W + scale * B A;  with a magnitude m (DoRA):  m (W + D) / |W0 + D|, D = scale * B A
    BiasAdded  b + scale * c, of biases
    Replaced   another tensor in place of the weight

Here |.| is the norm of each row and W0 the weight without other adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.checkpoint.tensors import Tensors
from moec.errors import CaptureError
from moec.files.adapter import AdapterConfig

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
