"""A stack of matrices -> the library of its kernels, for gradients (training/grouped.py)."""

from __future__ import annotations

from moec.cache import Store
from moec.codegen.build import compile_kernels
from moec.codegen.cpu.link import linked
from moec.codegen.cpu.training.grouped import mixed, outer, product
from moec.codegen.cpu.training.loops import Stack
from moec.target.cpu import CpuTarget


def compile_products(stack: Stack, target: CpuTarget, store: Store) -> bytes:
    """A shared library with `product`, `mixed`, both with `_biased` behind, and `outer`.

    Raises TargetError where there is no linker.
    """
    kernels = [outer(target, stack, "outer")]
    for kernel in (product, mixed):
        for biased in (False, True):
            name = kernel.__name__ + ("_biased" if biased else "")
            kernels.append(kernel(target, stack, biased, name))
    built = compile_kernels(*kernels, target=target, store=store)
    return linked(built, target)
