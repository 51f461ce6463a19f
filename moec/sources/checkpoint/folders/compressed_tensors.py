"""compressed-tensors, as llm-compressor writes it: tensors of a module say how it is stored.

    pack-quantized   weight_packed i32[N, K * bits / 32]   weight_scale [N, G]
                     weight_zero_point i32[N * bits / 32, G]?   weight_g_idx i32[K]?
    int-quantized    weight i8[N, K]                       weight_scale [N, 1], [N, G] or [1]
    float-quantized  weight e4m3[N, K]                     weight_scale, as fp8.py reads it

Packed integers are unsigned, 2^(bits-1) more than the signed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.fields import SCALES, check_dtype, check_shape
from moec.sources.checkpoint.folders import fp8
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

_PACKED = ".weight_packed"
_WEIGHT = ".weight"


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of a compressed-tensors checkpoint. Raises CaptureError where they do not fit."""
    weights = {}
    for name in tensors:
        module = name.removesuffix(_PACKED)
        if module != name:
            weights[module + _WEIGHT] = _packed(tensors, module)
        elif name.endswith(_WEIGHT) and tensors.dtype(name) == torch.int8:
            weights[name] = _int8(tensors, name)
    if _says_zeros(config):
        for name, weight in weights.items():
            if not any(part.endswith("_zero_point") for part in weight.tensors):
                raise CaptureError(
                    f"quantization_config says symmetric: false, and {name} has no zero points"
                )
    weights |= fp8.weights_of(tensors, fp8.block_of(config))
    claimed = {name for weight in weights.values() for name in weight.tensors}
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def _says_zeros(config: Mapping[str, Any]) -> bool:
    """Whether the weights of each group of the configuration have zero points."""
    groups = config.get("config_groups")
    plans = [
        group.get("weights") if isinstance(group, Mapping) else None
        for group in (groups.values() if isinstance(groups, Mapping) else ())
    ]
    return bool(plans) and all(
        isinstance(p, Mapping) and p.get("symmetric") is False for p in plans
    )


def _packed(tensors: Tensors, module: str) -> CheckpointWeight:
    names = [module + _PACKED, f"{module}.weight_scale", f"{module}.weight_shape"]
    for name in names:
        if name not in tensors:
            raise CaptureError(f"{names[0]} has no {name} next to it")
    packed, scales, shape_name = names
    words = tensors.shape(packed)
    check_dtype(tensors, shape_name, torch.int64, torch.int32)
    check_shape(shape_name, tensors.shape(shape_name), (2,))
    shape = tuple(tensors.read(shape_name).tolist())
    fits = len(words) == len(shape) == 2 and words[0] == shape[0] and shape[1] > 0
    bits = next((b for b in (2, 4, 8) if fits and -(-shape[1] * b // 32) == words[1]), None)
    if tensors.dtype(packed) != torch.int32 or bits is None:
        raise CaptureError(
            f"{packed} is {list(words)} of {tensors.dtype(packed)}, and its weight is "
            f"{list(shape)}: moec reads integers of 2, 4 and 8 bits in words of 32"
        )
    n, k = shape
    groups = _groups(tensors, scales, n, k)
    zeros = f"{module}.weight_zero_point"
    asymmetric = zeros in tensors
    if asymmetric:
        names.append(zeros)
        check_shape(zeros, tensors.shape(zeros), (-(-n * bits // 32), groups))
        check_dtype(tensors, zeros, torch.int32)

    def codes() -> Quantised:
        stored = unpack_first(tensors.read(zeros), bits)[:, :n].T if asymmetric else None
        if stored is None and bits == 2:
            stored = torch.full((n, groups), 2, dtype=torch.uint8)
        integers = unpack_last(tensors.read(packed), bits)[:, :k]
        zero = None if stored is None else stored.contiguous()
        return Quantised(integers.contiguous(), _scales(tensors, scales, n), zero)

    format = Format(
        "int8" if bits == 8 else "int4",
        k // groups if groups > 1 else 0,
        asymmetric or bits == 2,
        scales=scale_name(tensors.dtype(scales)),
    )
    return _in_groups(tensors, module, names, (n, k), WeightCodes(format, codes))


def _int8(tensors: Tensors, name: str) -> CheckpointWeight:
    scales, shape = f"{name}_scale", tensors.shape(name)
    if scales not in tensors or len(shape) != 2:
        raise CaptureError(f"the integers {name} have no {scales}, or are no matrix")
    n, k = shape
    groups = _groups(tensors, scales, n, k)
    names = [name, scales]
    zeros = f"{name}_zero_point"
    asymmetric = zeros in tensors
    if asymmetric:
        names.append(zeros)
        check_shape(zeros, tensors.shape(zeros), tensors.shape(scales))
        check_dtype(tensors, zeros, torch.int8)
    names += [extra for extra in (f"{name}_shape",) if extra in tensors]

    def codes() -> Quantised:
        stored = tensors.read(zeros).reshape(-1, groups).expand(n, groups) if asymmetric else None
        zero = None if stored is None else _unsigned(stored).contiguous()
        return Quantised(_unsigned(tensors.read(name)), _scales(tensors, scales, n), zero)

    block = k // groups if groups > 1 else 0
    format = Format("int8", block, asymmetric, scales=scale_name(tensors.dtype(scales)))
    return _in_groups(
        tensors, name.removesuffix(_WEIGHT), names, (n, k), WeightCodes(format, codes)
    )


def _unsigned(integers: Tensor) -> Tensor:
    return integers.view(torch.uint8) ^ 128


def _groups(tensors: Tensors, name: str, n: int, k: int) -> int:
    """The scales of a row: one, also where all rows share it, or one a group."""
    check_dtype(tensors, name, *SCALES)
    shape = tensors.shape(name)
    if shape in ((), (1,), (n,), (n, 1)):
        return 1
    if len(shape) != 2 or shape[0] != n or not shape[1] or k % shape[1]:
        raise CaptureError(f"{name} is {list(shape)}: no scales of a weight of {[n, k]}")
    return shape[1]


def _scales(tensors: Tensors, name: str, n: int) -> Tensor:
    scales = tensors.read(name)
    scales = scales.view(n, -1) if scales.numel() > 1 else scales.view(1, 1).expand(n, 1)
    if scales.dtype not in (torch.bfloat16, torch.float16):
        scales = scales.float()
    return scales.contiguous()


def _in_groups(
    tensors: Tensors, module: str, names: list[str], shape: tuple[int, int], codes: WeightCodes
) -> CheckpointWeight:
    """The weight, whose groups are blocks of a row unless `weight_g_idx` says otherwise."""
    order_name = f"{module}.weight_g_idx"
    if order_name not in tensors:
        return in_codes(shape, tuple(names), codes)
    check_shape(order_name, tensors.shape(order_name), (shape[1],))
    check_dtype(tensors, order_name, torch.int32, torch.int64)
    order, size = tensors.read(order_name).long(), codes.format.block or shape[1]
    if bool((order == torch.arange(shape[1]) // size).all()) or bool((order == -1).all()):
        return in_codes(shape, (*names, order_name), codes)
    if bool(((order < 0) | (order >= shape[1] // size)).any()):
        raise CaptureError(f"{order_name} names groups that the scales do not have")

    def values() -> Tensor:
        stored = codes.read()
        middle = 2.0 ** (codes.format.bits - 1)
        zero = middle if stored.zeros is None else stored.zeros.float()[:, order]
        return (stored.codes.float() - zero) * stored.scales.float()[:, order]

    reason = "act-order: groups are not blocks of a row"
    nearest = nearest_int8(shape[1])
    return CheckpointWeight(shape, (*names, order_name), values, nearest=nearest, reason=reason)
