"""How the names and tensors of a checkpoint become those of a model: transformers renames, stacks
experts, concatenates gate and up, and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Group = Sequence[tuple[str | None, str]]
"""The weights of a checkpoint that are converted together: each with the pattern that its name
matched, or None if it is only renamed."""


@dataclass(frozen=True)
class Conversion:
    """The renamings and converters of a model. `state` has its tensors without their values."""

    model: Any
    renamings: Sequence[Any]
    converters: Sequence[Any]
    state: Mapping[str, Tensor]

    def target(self, name: str) -> tuple[str, str | None]:
        """The weight of the model that a weight of a checkpoint is a part of, the first one where
        it is split; and the pattern of its converter, or None where it is that weight."""
        from transformers.core_model_loading import rename_source_key

        if name in self.state:
            return name, None
        return rename_source_key(  # type: ignore[no-any-return]
            name, self.renamings, self.converters, self.model.base_model_prefix, self.state
        )

    def groups(self, names: Iterable[str]) -> dict[str, Group]:
        """The weights of a checkpoint by their target, in the order in which they are stacked."""
        from transformers.core_model_loading import dot_natural_key

        groups: dict[str, list[tuple[str | None, str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self.target(name)
            groups.setdefault(target, []).append((pattern, name))
        return dict(groups)

    def convert(self, target: str, group: Group, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of the model that those of a group become."""
        converter = deepcopy(self._converter(group))
        if converter is None:
            return {target: tensors[0]}
        for (source, name), tensor in zip(group, tensors, strict=True):
            converter.add_tensor(target, name, source, lambda tensor=tensor: tensor)
        converted = converter.convert(target, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in converted.items()}

    def needs_values(self, group: Group) -> bool:
        """Whether transformers copies the tensors to the CPU while it converts them."""
        return getattr(self._converter(group), "force_cpu", False)

    def _converter(self, group: Group) -> Any | None:
        of_pattern = {p: each for each in self.converters for p in each.source_patterns}
        pattern = group[0][0]
        return None if pattern is None else of_pattern[pattern]


def conversion_of(model: Any) -> Conversion:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model, None, None)
    return Conversion(
        model,
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
        {name: tensor.to("meta") for name, tensor in model.state_dict().items()},
    )
