"""GPTQ, as AutoGPTQ and GPTQModel write it: integers packed along K, a scale and a zero a group.

    w[n, k] = scales[g, n] * (q[n, k] - z[g, n])     g = g_idx[k]

    qweight i32[K * bits / 32, N]   qzeros i32[G, N * bits / 32]   scales f16[G, N]   g_idx i32[K]

Version 1 stores z - 1. Where `g_idx` is not k / group (act-order), groups are not blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.fields import SCALES, check_dtype, check_shape, group, number, text
from moec.sources.checkpoint.folders.packed_integers import unpack_first, unpack_last
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import (
    CheckpointWeight,
    WeightCodes,
    in_codes,
    nearest_int8,
    plain,
    scale_name,
)

_PACKED = ".qweight"


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of a GPTQ checkpoint. Raises CaptureError where its tensors do not fit."""
    bits = number(config, "bits", (2, 4, 8), 4)
    less = text(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq"
    weights = {}
    claimed: set[str] = set()
    for name in tensors:
        if name.endswith(_PACKED):
            module = name.removesuffix(_PACKED)
            weight = _weight(config, tensors, module, bits, less)
            weights[f"{module}.weight"] = weight
            claimed.update(weight.tensors)
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def _weight(
    config: Mapping[str, Any], tensors: Tensors, module: str, bits: int, less: bool
) -> CheckpointWeight:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    for name in names:
        if name not in tensors:
            raise CaptureError(f"{names[0]} has no {name} next to it")
    packed, zeros_name, scales_name = names
    each = 32 // bits
    rows, n = _matrix(tensors, packed)
    k = rows * each
    size = group(config, k, packed)
    check_shape(scales_name, tensors.shape(scales_name), (k // size, n))
    check_shape(zeros_name, tensors.shape(zeros_name), (k // size, n // each))
    check_dtype(tensors, scales_name, *SCALES)
    check_dtype(tensors, zeros_name, torch.int32)
    order_name = f"{module}.g_idx"
    if order_name in tensors:
        names.append(order_name)
        check_shape(order_name, tensors.shape(order_name), (k,))
        check_dtype(tensors, order_name, torch.int32, torch.int64)
    elif config.get("desc_act") is True:
        raise CaptureError(f"quantization_config says desc_act, and {packed} has no {order_name}")
    symmetric = config.get("sym", True) is True

    def zeros() -> Tensor:
        stored = unpack_last(tensors.read(zeros_name), bits).T.contiguous()
        return stored + 1 if less else stored

    def codes() -> Quantised:
        scales = tensors.read(scales_name).T.contiguous()
        stored = zeros()
        if symmetric and bool((stored != 2 ** (bits - 1)).any()):
            raise CaptureError(f"quantization_config says sym, and {zeros_name} has other zeros")
        # two bits are stored as four, with their zeros
        without = symmetric and bits > 2
        return Quantised(
            unpack_first(tensors.read(packed), bits), scales, None if without else stored
        )

    if order_name in tensors and not _in_blocks(tensors.read(order_name), size):
        order = tensors.read(order_name).long()
        if bool(((order < 0) | (order >= k // size)).any()):
            raise CaptureError(f"{order_name} names groups that {scales_name} does not have")

        def values() -> Tensor:
            stored = codes()
            zero = 2.0 ** (bits - 1) if stored.zeros is None else stored.zeros.float()[:, order]
            return (stored.codes.float() - zero) * stored.scales.float()[:, order]

        reason = "act-order: groups are not blocks of a row"
        return CheckpointWeight(
            (n, k), tuple(names), values, nearest=nearest_int8(k), reason=reason
        )
    format = Format(
        "int8" if bits == 8 else "int4",
        size if size < k else 0,
        not symmetric or bits == 2,
        scales=scale_name(tensors.dtype(scales_name)),
    )
    return in_codes((n, k), tuple(names), WeightCodes(format, codes))


def _matrix(tensors: Tensors, name: str) -> tuple[int, int]:
    shape = tensors.shape(name)
    check_dtype(tensors, name, torch.int32)
    if len(shape) != 2:
        raise CaptureError(f"the tensor {name} is no matrix")
    return shape[0], shape[1]


def _in_blocks(order: Tensor, size: int) -> bool:
    return bool((order == torch.arange(len(order)) // size).all())
