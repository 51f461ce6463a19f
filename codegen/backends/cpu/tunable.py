"""The kernels of products, in the form that tuning takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.tuning import candidates
from moec.codegen.tuning.tunable import KernelWork, Tunable


def tunable(
    name: str,
    spec: object,
    layouts: Sequence[Layout],
    top_k: int,
    make: Callable[[str, Mapping[str, int]], PrimFunc],
    values: Sequence[str],
) -> Tunable:
    """`spec` is what the kernel is generated from, with a complete `repr`. `layouts` are those of
    its weights: of experts, or of one or more dense products of the same rows."""
    first = layouts[0].spec
    sizes = "x".join(map(str, (*((first.groups,) if first.groups > 1 else ()), first.n, first.k)))
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
    title = f"{name}, {sizes}"
    sums, size = sum(layout.sums for layout in layouts), sum(layout.bytes for layout in layouts)
    return Tunable(
        title,
        f"{title} {digest}",
        KernelWork(top_k, first.groups, sums, size),
        make,
        {value: candidates(value) for value in values},
    )
