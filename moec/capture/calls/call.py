"""One calling convention for every module: the tensors of its arguments, flattened in order.

All other arguments (flags, None, numbers) keep the values that they have in the example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from moec.capture.calls.constants import constants_computed, is_ordinary
from moec.capture.state.traced_changes import as_traced
from moec.ir.interpret.outputs import Structure, checked, flatten
from moec.torch_private import pytree


# Positions of tokens in texts with images (M-RoPE), computed with tensors.
#
# transformers loops over the runs of text and image tokens of each text, which no trace can follow.
# A run's positions begin where the run before ends: text tokens advance by 1, an image by the
# longer side of its merged grid. So the positions are cumulative sums, given the grids of the
# images. That holds for Qwen-VL, GLM-V and ERNIE-VL; the comparison with eager refuses any other
# rule.
@contextmanager
def positions_as_tensors(model: torch.nn.Module) -> Iterator[None]:
    """While open, modules compute the positions of texts with images of constant grids with
    tensors."""
    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "get_rope_index") and hasattr(module, "get_vision_position_ids"):
                replacement = _replaced(module, module.get_rope_index)
                stack.enter_context(mock.patch.object(module, "get_rope_index", replacement))
        yield


def _replaced(module: Any, original: Any) -> Any:
    def get_rope_index(
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> Any:
        if image_grid_thw is None or video_grid_thw is not None or not is_ordinary(image_grid_thw):
            return original(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                **rest,
            )
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = torch.arange(input_ids.shape[0])  # further rows are not read
        token_types = mm_token_type_ids[rows]
        ids = positions(module, token_types, image_grid_thw, attended.bool())
        return ids.to(input_ids.dtype), None  # the offsets serve a cache only

    return get_rope_index


def positions(
    module: Any, token_types: torch.Tensor, grids: torch.Tensor, attended: torch.Tensor
) -> torch.Tensor:
    """i64[3, B, S]: the temporal, vertical and horizontal position of each token; 0 where it is
    not `attended`. `token_types` [B, S] is 1 for tokens of images, whose `grids` [N, 3] are in
    the order of the images in the texts."""
    merge = module.config.vision_config.spatial_merge_size
    inside = [module.get_vision_position_ids(0, grid, 1, merge) for grid in grids]
    steps = []
    for grid, table in zip(grids.tolist(), inside, strict=True):
        steps += [0] * (table.shape[1] - 1) + [max(grid[1], grid[2]) // merge]
    tables, advance = torch.cat(inside, dim=1), torch.tensor(steps)
    image = (token_types == 1) & attended
    order = (image.flatten().long().cumsum(0) - 1).clamp(0, len(steps) - 1).reshape(image.shape)
    step = torch.where(image, advance[order], attended.long())
    start = step.cumsum(1) - step
    return torch.where(attended, start + torch.where(image, tables[:, order], 0), 0)


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
