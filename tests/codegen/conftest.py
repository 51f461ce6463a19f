"""Builds one kernel for one target, to be called with torch tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import tvm
from torch import Tensor

from moec.codegen.build import compile_kernels
from moec.target.cpu import CpuTarget


@pytest.fixture(scope="session")
def build() -> Callable[[CpuTarget, tvm.tirx.PrimFunc], Callable[..., None]]:
    """(target, kernel) -> a function that takes torch tensors, the results last."""

    def make(target: CpuTarget, kernel: tvm.tirx.PrimFunc) -> Callable[..., None]:
        library = compile_kernels(kernel, target=target, checked=True)
        function = library[str(kernel.attrs["global_symbol"])]

        def call(*tensors: Tensor) -> None:
            assert all(t.is_contiguous() for t in tensors)
            function(*(tvm.runtime.from_dlpack(t) for t in tensors))

        return call

    return make


@pytest.fixture(scope="session")
def rounding() -> dict[torch.dtype, float]:
    """The greatest relative error of rounding to a type: half a unit in the last place."""
    return {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
