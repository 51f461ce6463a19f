"""The feed-forward network that stacked parameters form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from moec.capture.behaviour.layer.description import FeedForward

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "none": lambda z: z,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu2": lambda z: F.relu(z) ** 2,
}


def feed_forward(
    body: FeedForward, rows: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Applies experts to rows [.., T, D], with one expert's matrices and biases or stacks [E, ..]
    of them; returns [.., T, D]. Biases follow the matrices and are distinguished by their
    lengths."""
    matrices = [w.mT if turned else w for w, turned in zip(weights, body.transposed, strict=False)]
    vectors = weights[len(matrices) :]
    biases = {v.shape[-1]: v.unsqueeze(-2) if v.dim() > 1 else v for v in vectors}

    def biased(y: torch.Tensor) -> torch.Tensor:
        bias = biases.get(y.shape[-1])
        return y if bias is None else y + bias

    y = rows @ matrices[0]
    if body.kind == "linear":
        return biased(y)
    y = biased(y)
    activation = ACTIVATIONS[body.activation]
    if body.kind == "packed":
        gate, up = y.chunk(2, -1)
        inner = activation(gate) * up
    elif body.kind == "gated":
        inner = activation(y) * (rows @ matrices[2])
    else:
        inner = activation(y)
    return biased(inner @ matrices[1])
