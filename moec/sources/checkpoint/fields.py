"""Fields of a quantization_config, checked: numbers and texts from a file that a stranger wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from moec.errors import CaptureError
from moec.sources.checkpoint.tensors import Tensors

SCALES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes of scales."""


def number(config: Mapping[str, Any], name: str, allowed: Collection[int], default: int) -> int:
    """An integer of the configuration. Raises CaptureError where it is not one of `allowed`."""
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        numbers = ", ".join(map(str, sorted(allowed)))
        raise CaptureError(f"quantization_config: {name} is {value!r}; moec reads {numbers}")
    return value


def text(config: Mapping[str, Any], name: str, allowed: Collection[str], default: str) -> str:
    """A text of the configuration, in lower case. Raises CaptureError for others."""
    value = config.get(name)
    lower = default if value is None else str(value).lower()
    if lower not in allowed:
        raise CaptureError(
            f"quantization_config: {name} is {value!r}; moec reads {', '.join(sorted(allowed))}"
        )
    return lower


def group(config: Mapping[str, Any], width: int, name: str) -> int:
    """The weights of a row that share a scale, of `group_size`; -1 is a whole row.

    Raises CaptureError where it does not divide a row of `width` weights of `name`.
    """
    size = config.get("group_size", -1)
    size = width if size in (-1, None) else size
    if not isinstance(size, int) or size < 1 or width % size:
        raise CaptureError(f"{name}: groups of {size!r} do not divide rows of {width} weights")
    return size


def check_dtype(tensors: Tensors, name: str, *allowed: torch.dtype) -> None:
    """Raises CaptureError unless a tensor has one of the allowed dtypes."""
    dtype = tensors.dtype(name)
    if dtype not in allowed:
        message = f"the tensor {name} is of {dtype}, and its format makes it "
        raise CaptureError((message + " or ".join(map(str, allowed))).replace("torch.", ""))


def check_shape(name: str, shape: tuple[int, ...], *expected: tuple[int, ...]) -> None:
    """Raises CaptureError unless a tensor has one of the expected shapes."""
    if shape not in expected:
        forms = " or ".join(str(list(form)) for form in expected)
        raise CaptureError(f"the tensor {name} is {list(shape)}, and its weight makes it {forms}")
