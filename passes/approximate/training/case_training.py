"""Trains numbers of a changed model on the calibration data, towards the original's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def case_order(cases: int, steps: int, seed: int) -> list[int]:
    """The case of each step: all of them in a random order, then in another one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += reversed(torch.randperm(cases, generator=generator).tolist())
    return order[:steps]


def train(
    tensors: Sequence[Tensor], rate: float, order: Sequence[int], loss: Callable[[int], Tensor]
) -> Iterator[int]:
    """One step of Adam on the loss of each case of `order`, with cosine decay of the learning rate
    to 0; after each the number of steps so far. A tensor on which a loss does not depend stays."""
    adam = torch.optim.Adam(tensors, lr=rate)
    for step, case in enumerate(order):
        for group in adam.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        slopes = torch.autograd.grad(loss(case), tensors, allow_unused=True)
        for tensor, slope in zip(tensors, slopes, strict=True):
            tensor.grad = slope
        adam.step()
        yield step + 1


def output_distance(
    results: Sequence[Tensor], right: Sequence[Tensor], text: tuple[int, int] | None
) -> Tensor:
    """The divergence of the next token, in nats, from the original's outputs `right`; for a model
    that is no language model (`text` is None) the squared relative error of the outputs."""
    if text is None:
        off = [
            (a - b).square().sum() / b.square().sum() for a, b in zip(results, right, strict=True)
        ]
        return torch.stack(off).sum()
    q, p = (scores[text[1]].log_softmax(-1).flatten(0, -2) for scores in (results, right))
    return torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
