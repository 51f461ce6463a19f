"""Products for training by kernels that read the model's own weights, without packing.

The kernels for stacked weights of one shape and dtype are compiled at the first product with them,
and stored in the cache with the compiled blocks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moec.cache import LIBRARIES, Store, key_of, load, save, source_version
from moec.codegen.cpu.training.loops import MatrixStack
from moec.codegen.gradient_library import compile_products
from moec.dtypes import MODEL_DTYPES
from moec.dynamo.training.gradients import IN_PYTORCH, Products
from moec.dynamo.training.huge_pages import advise_huge_pages
from moec.runtime.device.library import open_kernels, tvm_ffi
from moec.target.cpu import CpuTarget

_DTYPES = {getattr(torch, name): name for name in MODEL_DTYPES}
MANY = 32
"""Rows per expert from which tile registers pay: two tiles full (chosen, not measured)."""
_OPENED: dict[tuple[MatrixStack, CpuTarget], Any] = {}
"""The kernels loaded in this process, by shape and dtype of the stack, and target."""
_OPENING = threading.Lock()


@dataclass(frozen=True)
class ProductKernels(Products):
    """Products by kernels for `target`, stored in `cache`.

    PyTorch computes them for other dtypes, for stacks that are contiguous neither as [E, N, K] nor
    as [E, K, N], and for many bf16 rows where the target has tile registers, which PyTorch uses.
    """

    target: CpuTarget
    cache: Store

    def product(self, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        match = self._kernels_for(rows, w)
        if match is None:
            return IN_PYTORCH.product(rows, ends, w, b)
        kernels, stack, transposed = match
        y = rows.new_empty(len(rows), w.shape[1])
        name = "mixed" if transposed else "product"
        biases = () if b is None else (b.contiguous(),)
        _call(kernels[name + "_biased" * len(biases)], rows, ends, stack, *biases, y)
        return y

    def mixed(self, grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        match = self._kernels_for(grad, w)
        if match is None:
            return IN_PYTORCH.mixed(grad, ends, w)
        kernels, stack, transposed = match
        dx = grad.new_empty(len(grad), w.shape[2])
        _call(kernels["product" if transposed else "mixed"], grad, ends, stack, dx)
        return dx

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        match = self._kernels_for(rows, w)
        if match is None:
            return IN_PYTORCH.outer(grad, rows, ends, w)
        kernels, stack, transposed = match
        dw = advise_huge_pages(torch.empty_like(stack))
        factors = (rows, grad) if transposed else (grad, rows)
        _call(kernels["outer"], *factors, ends, dw)
        return dw.mT if transposed else dw

    def _kernels_for(self, rows: Tensor, w: Tensor) -> tuple[Any, Tensor, bool] | None:
        """(kernels, contiguous stack, whether it is `w` transposed), or None where PyTorch is used:
        another dtype or device, neither layout contiguous, or AMX tiles with many rows."""
        if w.dtype not in _DTYPES or rows.dtype != w.dtype or not w.is_cpu:
            return None
        if self.target.bf16_tiles and w.dtype is torch.bfloat16 and len(rows) >= MANY * len(w):
            return None
        transposed = not w.is_contiguous()
        stack = w.mT if transposed else w
        if not stack.is_contiguous() or not stack.numel():
            return None
        experts, n, k = stack.shape
        alike = MatrixStack(experts, n, k, _DTYPES[w.dtype])
        return _opened(alike, self.target, self.cache), stack, transposed


def _opened(stack: MatrixStack, target: CpuTarget, cache: Store) -> Any:
    """The kernels for stacks of one shape and dtype, by name."""
    with _OPENING:
        if (stack, target) not in _OPENED:
            _OPENED[stack, target] = open_kernels(_library(stack, target, cache))
        return _OPENED[stack, target]


def _library(stack: MatrixStack, target: CpuTarget, cache: Store) -> bytes:
    key = key_of(stack, target, source_version(), version("apache-tvm"))
    library = load(cache, LIBRARIES, key)
    if library is None:
        library = compile_products(stack, target, cache)
        save(cache, LIBRARIES, {key: library})
    return library


def _call(kernel: Any, *tensors: Tensor) -> None:
    view = tvm_ffi().from_dlpack
    kernel(*(view(tensor.detach()) for tensor in tensors))
