"""Positions of tokens in texts with images (M-RoPE), computed with tensors.

transformers loops over the runs of text and image tokens of each text, which no trace can follow. A
run's positions begin where the run before ends: text tokens advance by 1, an image by the longer
side of its merged grid. So the positions are cumulative sums, given the grids of the images. That
holds for Qwen-VL, GLM-V and ERNIE-VL; the comparison with eager refuses any other rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from moec.capture.calls.constants import is_ordinary


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
