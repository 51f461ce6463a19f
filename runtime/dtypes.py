"""The dtypes of the IR as numpy holds them; bf16 is numpy's by way of ml_dtypes."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
    "c64": np.dtype(np.complex64),
}
_NAMES = {dtype: name for name, dtype in NUMPY.items()}
_SPELLED = {dtype.name: name for name, dtype in NUMPY.items()}


def name_of(dtype: Any) -> str:
    """The IR's name of a numpy or torch dtype; its own name where the IR has none."""
    if isinstance(dtype, np.dtype):
        return _NAMES.get(dtype, str(dtype))
    spelled = str(dtype).removeprefix("torch.")  # torch need not be imported to read this
    return _SPELLED.get(spelled, spelled)
