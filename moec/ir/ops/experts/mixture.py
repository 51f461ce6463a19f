"""moe.mixture: the weighted sum of experts of different architectures, all of which are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require


def _infer_mixture(op: Op) -> tuple[TensorType, ...]:
    shares, *rest = op.inputs
    body = op.body
    require(op, body is not None, "has no body")
    assert body is not None
    require(op, shares.shape[-1] == len(body.outputs), f"{shares} weighs {len(body.outputs)}")
    parameters = (*body.inputs, *body.params)
    require(op, len(parameters) == len(rest), f"{len(rest)} values for {len(parameters)}")
    for value, parameter in zip(rest, parameters, strict=True):
        require(op, value.type == parameter.type, f"{value} feeds {parameter}")
    first = body.outputs[0]
    for other in body.outputs:
        require(op, other.type == first.type, f"experts give {first.type} and {other.type}")
    require(op, shares.shape[:-1] == first.shape[: len(shares.shape) - 1], f"{shares} of {first}")
    return (first.type,)


@defop("moe.mixture", _infer_mixture, "shares, values*")
def mixture(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """shares[.., E], inputs..., params... -> sum over e of shares[.., e] * (output e of the body).

    The body's inputs and params are the op's; its E outputs have one type. Experts may differ in
    everything else. Summed in the order of the experts.
    """
    shares, *rest = tensors
    assert op.body is not None
    outputs = run(op.body, rest)
    last = (1,) * (outputs[0].ndim - shares.ndim + 1)
    parts = [
        output * share.reshape(*share.shape, *last)
        for output, share in zip(outputs, shares.unbind(-1), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
