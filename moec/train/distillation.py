"""Staged distillation of a mixture of experts into one of fewer layers (Mixture-of-Students).

    loss = StagedDistillation(alpha=1.0, stop=400_000)
    for step, …: loss(student(ids), teacher(ids), targets, step).backward(); optimizer.step()

A student that follows its teacher until the end of training loses accuracy, because it is too small
for both objectives. So from a certain step on, only the targets count (DeepSpeed-MoE, arXiv
2201.05596, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from moec.errors import UsageError


@dataclass(frozen=True)
class StagedDistillation:
    """Cross entropy + `alpha` KL(teacher | student); from step `stop` on, the cross entropy alone.
    Raises UsageError for a negative `alpha` or `stop`."""

    alpha: float
    stop: int

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.stop < 0:
            raise UsageError(
                f"StagedDistillation(alpha={self.alpha}, stop={self.stop}): both must be 0 or more"
            )

    def __call__(
        self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The loss of logits [.., V] of both models for the targets [..], a mean over tokens in
        nats. The teacher gets no gradient."""
        classes = student.flatten(0, -2)
        loss = F.cross_entropy(classes, targets.flatten())
        if step >= self.stop:
            return loss
        aims = teacher.detach().flatten(0, -2).softmax(-1)
        return loss + self.alpha * F.kl_div(classes.log_softmax(-1), aims, reduction="batchmean")
