"""Ops with kernels of our own: which of them a kernel takes, and how it is called."""

from moec.codegen.rules import (
    attention,
    caches,
    compressed,
    dense,
    experts,
    norms,
    quantised,
    quantised_linears,
    routing,
    scans,
    sizes,
    zero_experts,
)
from moec.codegen.rules.table import KERNELS, has_kernel

FILLED_BY = (
    attention,
    caches,
    compressed,
    dense,
    experts,
    norms,
    quantised,
    quantised_linears,
    routing,
    scans,
    sizes,
    zero_experts,
)

__all__ = ["KERNELS", "has_kernel"]
