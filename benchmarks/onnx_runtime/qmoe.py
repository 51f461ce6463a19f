"""A layer's experts as ONNX Runtime's QMoE (com.microsoft), with moec's own codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from moec.ir.formats.integer import quantise
from moec.ir.formats.notation import Format


def qmoe(layer: Any, format: Format, threads: int) -> Callable[[Tensor], Tensor]:
    """x[1, T, D] -> [1, T, D] for a block of OLMoE that normalises: symmetric codes, activations of
    8 bits.

    QMoE's SwiGLU takes alternating rows of gate and up; `alpha` 1 and `beta` 0 make it the usual
    SwiGLU. Its scales are float32.
    """
    experts = layer.experts
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    fc1 = torch.stack([gate, up], 2).flatten(1, 2)
    weights = {}
    for name, weight in (("fc1", fc1), ("fc2", experts.down_proj)):
        quantised = quantise(format, weight)
        codes = quantised.codes
        if format.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        scales = quantised.scales.float() if format.block else quantised.scales.float().squeeze(-1)
        weights[f"{name}_w"] = codes.numpy()
        weights[f"{name}_s"] = scales.numpy()
    width = fc1.shape[-1]
    node = helper.make_node(
        "QMoE",
        ["x", "logits", "fc1_w", "fc1_s", "", "fc2_w", "fc2_s"],
        ["y"],
        domain="com.microsoft",
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        k=layer.gate.top_k,
        normalize_routing_weights=1,  # 1.31 normalises with either value
        expert_weight_bits=format.bits,
        accuracy_level=4,
        **({"block_size": format.block} if format.block else {}),
    )
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", size])
        for name, size in (("x", width), ("logits", fc1.shape[0]), ("y", width))
    ]
    graph = helper.make_graph(
        [node],
        "qmoe",
        ports[:2],
        ports[2:],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(x: Tensor) -> Tensor:
        rows = x[0]
        logits = torch.nn.functional.linear(rows, layer.gate.weight).float()
        feed: dict[str, np.ndarray[Any, Any]] = {
            "x": rows.float().numpy(),
            "logits": logits.numpy(),
        }
        return torch.from_numpy(session.run(None, feed)[0])[None]

    return run
