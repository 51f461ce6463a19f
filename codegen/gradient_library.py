"""Compiles the library of kernels for the gradients of a stack of matrices
(training/grouped.py)."""

from __future__ import annotations

from moec.cache import Store
from moec.codegen.build import compile_kernels
from moec.codegen.cpu.link import linked
from moec.codegen.cpu.training.grouped import mixed, outer, product
from moec.codegen.cpu.training.loops import MatrixStack
from moec.target.cpu import CpuTarget


def compile_products(stack: MatrixStack, target: CpuTarget, store: Store) -> bytes:
    """A shared library with `product`, `mixed`, the same two with the suffix `_biased`, and
    `outer`.

    Raises TargetError if there is no linker.
    """
    kernels = [outer(target, stack, "outer")]
    for kernel in (product, mixed):
        for biased in (False, True):
            name = kernel.__name__ + ("_biased" if biased else "")
            kernels.append(kernel(target, stack, biased, name))
    built = compile_kernels(*kernels, target=target, store=store)
    return linked(built, target)
