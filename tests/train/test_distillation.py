"""Staged distillation: the teacher is used until a given step, then only the targets."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moec.errors import UsageError
from moec.train import StagedDistillation

STOP = 10


def logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)


def test_the_teacher_counts_until_the_step() -> None:
    student, teacher, targets = logits(0), logits(1), torch.tensor([[0, 1, 2], [3, 4, 0]])
    entropy = F.cross_entropy(student.flatten(0, 1), targets.flatten())
    p, q = teacher.softmax(-1), student.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    loss = StagedDistillation(alpha=0.7, stop=STOP)
    before, after = (loss(student, teacher, targets, step) for step in (STOP - 1, STOP))
    torch.testing.assert_close(before, entropy + 0.7 * divergence)
    torch.testing.assert_close(after, entropy)


def test_the_teacher_learns_nothing_and_one_that_agrees_adds_nothing() -> None:
    student, targets = logits(0).requires_grad_(), torch.zeros(2, 3, dtype=torch.int64)
    teacher = logits(0).requires_grad_()
    loss = StagedDistillation(1.0, STOP)(student, teacher, targets, 0)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    entropy = F.cross_entropy(student.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, entropy)


@pytest.mark.parametrize(("alpha", "stop"), [(-1.0, 1), (1.0, -1)])
def test_negative_numbers_are_refused(alpha: float, stop: int) -> None:
    with pytest.raises(UsageError, match="both must be 0 or more"):
        StagedDistillation(alpha, stop)
