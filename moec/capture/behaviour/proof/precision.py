"""Which part of the routing a 16-bit module computes in float32.

Rules are found and proved in float32, where all variants agree. In 16 bits, nearly equal scores
become equal and other experts are chosen. So each variant is compared with the module itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moec.capture.behaviour.expert_body import expert_body
from moec.capture.behaviour.inference.probe import Probe, result_leaves
from moec.capture.behaviour.layer.description import PRECISIONS, Description
from moec.capture.behaviour.layer.parts import float_dtype
from moec.capture.behaviour.replacement import Replacement, outputs

_SHAPE = (4, 128)
"""(sequences, tokens of each): enough for some scores to be equal in 16 bits but not in float32."""


def with_precision(module: nn.Module, probe: Probe, description: Description) -> Description:
    """`description` with the precision whose results are nearest to the module's own."""
    dtype = float_dtype(module)
    if description.form != "topk" or dtype not in (torch.bfloat16, torch.float16):
        return description
    tokens, *ids = probe.inputs(*_SHAPE)
    tokens = tokens.to(dtype)
    args, kwargs = probe.arguments.build(tokens, *ids)
    with torch.no_grad():
        expected = [value for _, value in result_leaves(module(*args, **kwargs))]

    body = expert_body(module, description, probe.width)

    def error(candidate: Description) -> float:
        block = Replacement(module, candidate, probe.width, body)
        with torch.no_grad():
            results = outputs(block, tokens, *ids)
        pairs = zip(results, expected, strict=True)
        return sum(_distance(a, b) for a, b in pairs if isinstance(b, torch.Tensor))

    candidates = [replace(description, precision=precision) for precision in PRECISIONS]
    return min(candidates, key=error)


def _distance(a: object, b: torch.Tensor) -> float:
    """The mean absolute difference relative to the mean absolute value of `b`."""
    assert isinstance(a, torch.Tensor)
    difference = (a.double() - b.double()).abs().nan_to_num(0.0)
    return float(difference.mean() / (b.double().abs().nan_to_num(0.0).mean() + 1e-12))
