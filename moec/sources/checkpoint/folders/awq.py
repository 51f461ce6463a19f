"""AWQ in its gemm form, as AutoAWQ writes it: four bits, packed along N in an order of its own.

w[n, k] = scales[g, n] * (q[n, k] - z[g, n])     g = k / group

qweight i32[K, N / 8]   qzeros i32[G, N / 8]   scales f16[G, N]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format
from moec.sources.checkpoint.fields import SCALES, check_dtype, check_shape, group, number, text
from moec.sources.checkpoint.folders.packed_integers import unpack_awq
from moec.sources.checkpoint.tensors import Tensors
from moec.sources.checkpoint.weight import (
    CheckpointWeight,
    WeightCodes,
    in_codes,
    plain,
    scale_name,
)

_PACKED = ".qweight"


def read(config: Mapping[str, Any], tensors: Tensors) -> dict[str, CheckpointWeight]:
    """The weights of an AWQ checkpoint. Raises CaptureError where its tensors do not fit."""
    number(config, "bits", (4,), 4)
    text(config, "version" if "version" in config else "format", ("gemm",), "gemm")
    weights = {}
    claimed: set[str] = set()
    for name in tensors:
        if name.endswith(_PACKED):
            module = name.removesuffix(_PACKED)
            weight = _weight(config, tensors, module)
            weights[f"{module}.weight"] = weight
            claimed.update(weight.tensors)
    return weights | {name: plain(tensors, name) for name in tensors if name not in claimed}


def _weight(config: Mapping[str, Any], tensors: Tensors, module: str) -> CheckpointWeight:
    asymmetric = config.get("zero_point", True) is not False
    parts = ("qweight", "scales", "qzeros") if asymmetric else ("qweight", "scales")
    names = [f"{module}.{part}" for part in parts]
    for name in names:
        if name not in tensors:
            raise CaptureError(f"{names[0]} has no {name} next to it")
    packed, scales = names[:2]
    shape = tensors.shape(packed)
    for name in (packed, *names[2:]):
        check_dtype(tensors, name, torch.int32)
    check_dtype(tensors, scales, *SCALES)
    if len(shape) != 2:
        raise CaptureError(f"the tensor {packed} is no matrix")
    k, n = shape[0], shape[1] * 8
    size = group(config, k, packed)
    check_shape(scales, tensors.shape(scales), (k // size, n))
    if asymmetric:
        check_shape(names[2], tensors.shape(names[2]), (k // size, n // 8))

    def codes() -> Quantised:
        zeros = unpack_awq(tensors.read(names[2])).T.contiguous() if asymmetric else None
        integers = unpack_awq(tensors.read(packed)).T.contiguous()
        return Quantised(integers, tensors.read(scales).T.contiguous(), zeros)

    block = size if size < k else 0
    format = Format("int4", block, asymmetric, scales=scale_name(tensors.dtype(scales)))
    return in_codes((n, k), tuple(names), WeightCodes(format, codes))
