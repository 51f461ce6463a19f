"""Tensors of ONNX as those of torch."""

from __future__ import annotations

import numpy as np
import onnx
import torch

from moec.errors import CaptureError
from moec.onnx_source.operators import dtype_of


def tensor_of(proto: onnx.TensorProto) -> torch.Tensor:
    """The tensor. Raises CaptureError where its elements are of no supported type or too few."""
    try:
        dtype = dtype_of(proto.data_type)
        array = np.array(onnx.numpy_helper.to_array(proto))
    except (NotImplementedError, ValueError, TypeError) as error:
        raise CaptureError(f"the tensor {proto.name!r} cannot be read: {error}") from error
    if dtype == torch.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
