"""The arguments of a kernel that hold compressed weights, in the form that suits its target."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moec.codegen.cpu.compressed.masks import Masks, TwoBits
from moec.codegen.cpu.compressed.signs import Signs, signed
from moec.codegen.cpu.frame import argument
from moec.codegen.specs.products import CompressedSpec
from moec.formats.ternary_code import CODEWORDS, SIGNED, dictionary, masks, signs
from moec.target.cpu import CpuTarget

Weights = Masks | Signs | TwoBits


def weights(spec: CompressedSpec, target: CpuTarget) -> tuple[Weights, ...]:
    """The arguments that hold the one stack of `spec`, or the two of a gated one."""
    halves = range(1 + spec.gated)
    if spec.kind == "2bit":
        return tuple(TwoBits.of(spec, i) for i in halves)
    if signed(target):
        entries = argument("signs", (CODEWORDS, SIGNED), "int8")
        return tuple(Signs.of(spec, i, entries, target) for i in halves)
    entries = argument("masks", (CODEWORDS,), "int64")
    return tuple(Masks.of(spec, i, entries, target) for i in halves)


def table(target: CpuTarget) -> npt.NDArray[Any]:
    """The one dictionary as an argument of kernels for `target`: 512 KiB of masks, or 2 MiB of
    signs."""
    entries = dictionary().entries
    return signs(entries) if signed(target) else masks(entries).view(np.int64)
