"""How transformers makes the weights of a model from those of a checkpoint: it renames, stacks
experts, concatenates gate and up, and so on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conversion:
    """Weights of a model by the `sources` of a checkpoint that they are made of. `target` is their
    name, or the first of several."""

    target: str
    sources: tuple[str, ...]
    model: Any
    converter: Any | None = None
    patterns: tuple[str, ...] = ()

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The weights by name, from the tensors of the sources."""
        if self.converter is None:
            return {self.target: tensors[0]}
        converter = deepcopy(self.converter)
        for pattern, name, tensor in zip(self.patterns, self.sources, tensors, strict=True):
            converter.add_tensor(self.target, name, pattern, lambda tensor=tensor: tensor)
        converted = converter.convert(self.target, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in converted.items()}


def conversions(model: Any, names: Collection[str]) -> list[Conversion]:
    """The conversions from the weights of a checkpoint, by name, to those of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model, None, None)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    groups: dict[str, list[tuple[str | None, str]]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if name in state:
            target, pattern = name, None
        groups.setdefault(target, []).append((pattern, name))
    result = []
    for target, group in groups.items():
        sources, first = tuple(name for _, name in group), group[0][0]
        if first is None:
            result.append(Conversion(target, sources, model))
        else:
            patterns = tuple(str(pattern) for pattern, _ in group)
            result.append(Conversion(target, sources, model, of_pattern[first], patterns))
    return result
