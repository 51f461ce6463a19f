"""The arrays of a package stay when the weights that they were made of are no longer in memory."""

from __future__ import annotations

import ctypes
import resource
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.codegen.module_builder import Param, as_array
from moec.codegen.package import packed_arrays
from moec.ir.graph import TensorType, Value
from moec.sources.memory.budget import MemoryBudget
from moec.sources.memory.memory import Bounded, InMemory

THRESHOLDS = 1, 4096, 1 << 19, 1 << 20
"""Bytes: a page of memory, and from where on weights are read later and arrays are in a file."""
DTYPES = torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool
VIEWS = {
    "whole": lambda weight: weight,
    "flat": lambda weight: weight.view(-1),
    "transposed": lambda weight: weight.mT,
    "rows": lambda weight: weight[1:],
    "columns": lambda weight: weight[:, 1:],
    "every other row": lambda weight: weight[::2],
}
PACKS = {
    "none": None,
    "bytes": lambda weight: as_array(weight).view(np.uint8),
    "reversed": lambda weight: as_array(weight)[::-1],
    "part": lambda weight: as_array(weight)[..., :1],
    "second": lambda first, second: as_array(second),  # as of tied weights
    "copy": lambda weight: as_array(weight) + as_array(weight),
}


def shapes(itemsize: int) -> list[tuple[int, int]]:
    """Of one element less, as many, and one more than a threshold has."""
    counts = {size // itemsize + more for size in THRESHOLDS for more in (-1, 0, 1)}
    rows = {n: next(r for r in (7, 4, 3, 2, 1) if n % r == 0) for n in counts if n > 0}
    return [(r, n // r) for n, r in rows.items()]


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_have_the_values_of_weights_in_memory(dtype, pack):
    memory = Bounded(MemoryBudget(1 << 40, 0, 0, 0, 0))
    params: list[Param] = []
    here: dict[str, Tensor] = {}
    paged: dict[str, Tensor] = {}
    for rows, columns in shapes(dtype.itemsize):
        noise = torch.randint(0, 2 if dtype is torch.bool else 128, (rows, columns))
        weight = noise.to(dtype)
        later = memory.paged.add(weight.shape, dtype, partial(Tensor.copy_, other=weight))
        for number, view in enumerate(VIEWS.values()):
            name = f"{rows}x{columns}.{number}"
            here[name], paged[name] = view(weight), view(later)
            value = Value(name, TensorType("f32", tuple(here[name].shape)))
            values = (value, value) if pack == "second" else (value,)
            params.append(Param(name, value.type, values, PACKS[pack]))
    with memory.reading():
        arrays = packed_arrays(params, paged, memory)
    expected = packed_arrays(params, here, InMemory())
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again_and_given_back() -> None:
    """A block of 64 MB has 16,384 pages, each of which the kernel would clear once more."""
    weight = torch.zeros(1 << 24, dtype=torch.bfloat16)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        weight.float()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with InMemory().reading():
        assert faults() > 0
        assert faults() == 0
    assert faults() > 0
