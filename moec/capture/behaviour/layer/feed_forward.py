"""The feed-forward networks that stacked parameters can form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

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


def feed_forwards(
    stacks: Mapping[str, torch.Tensor], width: int
) -> Iterator[tuple[FeedForward, tuple[str, ...]]]:
    """The feed-forward networks that the shapes of stacked parameters allow, each with the names of
    its parameters in order."""
    shape = {name: tuple(p.shape[1:]) for name, p in stacks.items()}
    matrices = [name for name in shape if len(shape[name]) == 2]
    for count in (3, 2, 1):
        turns = list(itertools.product((False, True), repeat=count))
        for names, turned in itertools.product(itertools.permutations(matrices, count), turns):
            sizes = [shape[n][::-1] if t else shape[n] for n, t in zip(names, turned, strict=True)]
            for kind in _kinds(sizes, width):
                for biases in _bias_choices(shape, sizes[0][1], width):
                    for activation in ACTIVATIONS if count > 1 else ("none",):
                        yield FeedForward(kind, activation, turned), (*names, *biases)


def _kinds(sizes: Sequence[tuple[int, ...]], width: int) -> Iterator[str]:
    hidden = sizes[0][1]
    up, down = (width, hidden), (hidden, width)
    forms = {
        "gated": [up, down, up],
        "plain": [up, down],
        "packed": [up, (hidden // 2, width)],
        "linear": [(width, width)],
    }
    return (kind for kind, form in forms.items() if form == list(sizes))


def _bias_choices(
    shape: Mapping[str, tuple[int, ...]], hidden: int, width: int
) -> Iterator[tuple[str, ...]]:
    vectors = [name for name in shape if shape[name] in ((hidden,), (width,))]
    for count in (2, 1, 0):
        for names in itertools.combinations(vectors, count):
            if len({shape[name] for name in names}) == count:
                yield names
