"""Shared by the tests of the two surveys: training compared with eager's, and the stored matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import moec
from docs.surveys import Survey

KeepSurvey = Callable[[Survey], None]
"""What the fixture `keep_survey` gives: it compares a matrix with the golden one."""


def gradients_agree(
    model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float, blocks: bool = True
) -> None:
    """The loss of a step and the gradients of all weights, compiled and eager; `blocks`: whether
    moec has kernels for a part of it."""
    eager, learner = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    torch._dynamo.reset()
    step = torch.compile(learner, backend="moec", options={"rest": "eager"})
    before = moec.stats().blocks
    losses = []
    for run in (step, eager):
        result = run(*inputs)
        parts = result if isinstance(result, tuple) else (result,)
        loss = sum((part.square().mean() for part in parts), torch.zeros(()))
        loss.backward()
        losses.append(loss.detach())
    assert (moec.stats().blocks > before) == blocks
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=tolerance)
    for ours, expected in zip(learner.parameters(), eager.parameters(), strict=True):
        if expected.grad is not None and expected.grad.any():
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, expected.grad, rtol=tolerance, atol=tolerance)
