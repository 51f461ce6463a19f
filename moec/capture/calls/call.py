"""One calling convention for every module: the tensors of its arguments, flattened in order.

All other arguments (flags, None, numbers) keep the values that they have in the example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.capture.calls.constants import constants_computed
from moec.capture.calls.rope_index import positions_as_tensors
from moec.capture.state.traced_changes import as_traced
from moec.interpret.outputs import Structure, checked, flatten
from moec.torch_private import pytree

PREFIX = "module"


class ModuleCall(torch.nn.Module):
    """`ModuleCall(module, args, kwargs)(*tensors)`: calls the module with the tensors in its
    arguments replaced by `tensors`, in order. The tensors of the numbers `constants` stay."""

    def __init__(
        self,
        module: torch.nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        constants: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        tensors = [i for i, x in enumerate(self.leaves) if isinstance(x, torch.Tensor)]
        self.places = [i for number, i in enumerate(tensors) if number not in constants]
        self.constants = tuple(self.leaves[tensors[number]] for number in sorted(constants))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.leaves[index] for index in self.places)

    def forward(self, *tensors: torch.Tensor) -> Any:
        filled = list(self.leaves)
        for index, tensor in zip(self.places, tensors, strict=True):
            filled[index] = tensor
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        return self.module(*args, **kwargs)


@dataclass
class _Returned:
    """The structure of what the last forward of a `FlatCall` returned. It is no pytree, so that
    torch.export ignores it."""

    structure: Structure | None = None


class FlatCall(ModuleCall):
    """A call that returns the tensors of the module's result as a flat tuple, because torch.export
    takes no dataclasses. Raises CaptureError for a result in which tensors cannot be found."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__(call.module, (), {})
        self.leaves, self.spec, self.places = call.leaves, call.spec, call.places
        self.constants = call.constants
        self.returned = _Returned()

    @property
    def structure(self) -> Structure:
        """The structure of the result of the last forward, without its tensors."""
        assert self.returned.structure is not None
        return self.returned.structure

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with (
            as_traced(self.module),
            constants_computed(bool(self.constants)),
            positions_as_tensors(self.module),
        ):
            results, structure = flatten(super().forward(*tensors), hold=self.hold)
        self.returned.structure = checked(structure)
        return results

    def hold(self, value: Any) -> torch.Tensor | None:
        """A tensor [] of a size that the module returns; None for other symbolic numbers."""
        if not isinstance(value, torch.SymInt):
            return None
        size: Any = value
        return torch.full((), size, dtype=torch.int64)
