"""Which part of the routing a module of 16 bits or float64 computes in float32.

Rules are found and proved in float32, where all variants agree. In 16 bits, nearly equal scores
become equal and other experts are chosen. So each variant is compared with the module itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moec.capture.behaviour.expert_body import expert_body
from moec.capture.behaviour.layer.description import PRECISIONS, Description
from moec.capture.behaviour.layer.parts import float_dtype
from moec.capture.behaviour.proof.probe import Probe, result_leaves
from moec.capture.behaviour.replacement import Replacement, outputs
from moec.errors import NoMatch
from moec.oracle.rounding import FLOAT64_UNIT, row_distances

_SHAPE = (4, 128)
"""(sequences, tokens of each): enough for some scores to be equal in 16 bits but not in float32."""


def with_precision(module: nn.Module, probe: Probe, description: Description) -> Description:
    """`description` with the precision whose results are nearest to the module's own.

    Raises NoMatch where none is near enough for a module of float64.
    """
    dtype = float_dtype(module)
    if dtype is torch.float32:
        return description
    tokens = probe.tokens(*_SHAPE).to(dtype)
    args, kwargs = probe.arguments.build(tokens)
    with torch.no_grad():
        expected = [value for _, value in result_leaves(module(*args, **kwargs))]

    body = expert_body(module, description, probe.width)

    def error(candidate: Description) -> float:
        block = Replacement(module, candidate, probe.width, body)
        with torch.no_grad():
            results = outputs(block, tokens)
        pairs = zip(results, expected, strict=True)
        tensors = (
            (a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        )
        return sum(float(row_distances(a, b)[1].mean()) for a, b in tensors)

    candidates = [replace(description, precision=precision) for precision in PRECISIONS]
    best = min(candidates, key=error)
    if dtype is torch.float64 and error(best) > FLOAT64_UNIT:
        raise NoMatch("it is of float64, and computes a part in fewer digits that was not found")
    return best
