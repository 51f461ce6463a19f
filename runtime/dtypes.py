"""The dtypes of the IR as numpy dtypes; bf16 comes from ml_dtypes."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from moec.dtypes import LONG_NAMES

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMPY: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bf16" else long)
    for name, long in LONG_NAMES.items()
}
_NAMES = {dtype: name for name, dtype in NUMPY.items()}
_SPELLED = {dtype.name: name for name, dtype in NUMPY.items()}


def name_of(dtype: Any) -> str:
    """The IR's name of a numpy or torch dtype; its own name where the IR has none."""
    if isinstance(dtype, np.dtype):
        return _NAMES.get(dtype, str(dtype))
    spelled = str(dtype).removeprefix("torch.")  # torch need not be imported to read this
    return _SPELLED.get(spelled, spelled)
