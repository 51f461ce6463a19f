"""The codes of a checkpoint in the arrangement of a model's weights.

transformers stacks experts, concatenates gate and up, and so on. The same conversions, run on
codes, scales and zeros, give the stored form of each weight of the model. (The pass that uses them
checks that they have the values of the weights: passes/quantise/keep_codes.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.conversion import conversion_of
from moec.sources.checkpoint.weight import CheckpointWeight
from moec.sources.memory.memory import InMemory


@dataclass(frozen=True)
class StoredWeight:
    """Codes in the memory layout of a weight [.., N, K], or [.., K, N] if `transposed`; scales and
    zeros have one element for each block of K."""

    format: Format
    parts: Quantised
    transposed: bool

    def of_view(self, view: Tensor) -> Quantised | None:
        """The parts of a view [.., N, K] of the weight, in the format's order; None for a view
        that cuts blocks."""
        size, block = view.shape, self.format.block or self._width
        if size[-1] % block:
            return None
        blocks = (*size[:-1], size[-1] // block)
        strides, offset = view.stride(), view.storage_offset()
        if not self.transposed:
            if strides[-1] != 1 or any(s % block for s in (*strides[:-1], offset)):
                return None
            scaled = [*(s // block for s in strides[:-1]), 1]
            first = offset // block
        else:
            row = strides[-1]  # the weights of one k are in a row
            columns = self.parts.codes.shape[-1]
            if row != columns or offset >= row or any(s % (row * block) for s in strides[:-2]):
                return None
            scaled = [*(s // block for s in strides[:-2]), strides[-2], row]
            first = offset

        def scales(tensor: Tensor) -> Tensor:
            return tensor.as_strided(blocks, scaled, first)

        return Quantised(
            self.parts.codes.as_strided(size, strides, offset).contiguous(),
            scales(self.parts.scales),
            None if self.parts.zeros is None else scales(self.parts.zeros),
        )

    @property
    def _width(self) -> int:
        return self.parts.codes.shape[-2 if self.transposed else -1]


@dataclass(frozen=True)
class ArrangedCodes:
    """The weights of a model that its checkpoint stores in few bits, by name: those in moec's
    formats, and the nearest format and the reason for the others."""

    stored: Mapping[str, StoredWeight]
    nearest: Mapping[str, tuple[Format, str]]


def arrange(
    model: Any,
    weights: Mapping[str, CheckpointWeight],
    others: Collection[str],
    memory: InMemory,
) -> ArrangedCodes:
    """The codes of the model's weights in `memory`, without the `others`, which have other values
    now."""
    conversion = conversion_of(model)
    stored: dict[str, StoredWeight] = {}
    nearest: dict[str, tuple[Format, str]] = {}
    for target, group in conversion.groups(weights).items():
        members = [weights[name] for _, name in group]
        if all(member.nearest is None and member.codes is None for member in members):
            continue
        arranged = _converted(members, partial(conversion.convert, target, group), memory)
        stored |= {name: codes for name, codes in arranged.items() if name not in others}
        if arranged or target in others:
            continue
        first = next((member for member in members if member.nearest is not None), None)
        if first is not None and first.nearest is not None:
            nearest[target] = first.nearest, first.reason
    return ArrangedCodes(stored, nearest)


def _converted(
    members: Sequence[CheckpointWeight],
    convert: Callable[[Sequence[Tensor]], dict[str, Tensor]],
    memory: InMemory,
) -> dict[str, StoredWeight]:
    """The weights that the members are converted to; none where their formats differ."""
    held = [member.codes for member in members if member.codes is not None]
    if len(held) < len(members):
        return {}
    formats = {replace(each.format, asymmetric=False) for each in held}
    if len(formats) > 1 or len({each.transposed for each in held}) > 1:
        return {}
    asymmetric = any(each.format.asymmetric for each in held)
    format = replace(held[0].format, asymmetric=asymmetric)
    parts = [each.read() for each in held]
    codes = convert([part.codes for part in parts])
    scales = convert([part.scales for part in parts])
    zeros = convert([_zeros(format, part) for part in parts]) if asymmetric else {}
    across = held[0].transposed

    def laid_out(tensor: Tensor) -> Tensor:
        return memory.tensor(tensor.mT.contiguous() if across else tensor.contiguous())

    return {
        name: StoredWeight(
            format,
            Quantised(
                laid_out(codes[name]),
                laid_out(scales[name]),
                laid_out(zeros[name]) if asymmetric else None,
            ),
            across,
        )
        for name in codes
    }


def _zeros(format: Format, part: Quantised) -> Tensor:
    if part.zeros is not None:
        return part.zeros
    return torch.full(part.scales.shape, 2 ** (format.bits - 1), dtype=torch.uint8)
