"""A kernel whose values can be tuned: what it is called, which values it reads, how it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx import PrimFunc

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.tuning import Tuning

Make = Callable[[str, Tuning], PrimFunc]


@dataclass(frozen=True)
class Tunable:
    """`make(name, tuning)` gives the kernel, which reads these `values` of its tuning; none where
    only the default is known to be right.

    `key` stands for all that it is generated from but the target and the tuning. Of each token it
    sees `top_k` rows. `layouts` are those of its weights: experts', or one or several dense ones
    that the same rows meet.
    """

    name: str
    key: str
    layouts: tuple[Layout, ...]
    top_k: int
    make: Make
    values: tuple[str, ...]

    @property
    def experts(self) -> int:
        return self.layouts[0].spec.groups


def tunable(
    name: str,
    spec: object,
    layouts: tuple[Layout, ...],
    top_k: int,
    make: Make,
    values: tuple[str, ...],
) -> Tunable:
    """`spec` is whatever the kernel is generated from, with a `repr` that tells it all."""
    first = layouts[0].spec
    sizes = "x".join(map(str, (*((first.groups,) if first.groups > 1 else ()), first.n, first.k)))
    digest = hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
    said = f"{name}, {sizes}"
    return Tunable(said, f"{said} {digest}", layouts, top_k, make, values)
