"""Plain top-2 layers that differ in one thing that usual inputs do not show."""

from __future__ import annotations

from typing import ClassVar

import torch

from tests.capture.behaviour.modules import EXPERTS, TOP_K, Layer


class LookAlike(Layer):
    """Counts are read into Python, so that nothing can be traced; a subclass changes one step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.weigh(self.logits(flat))
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        out = torch.zeros_like(flat)
        for i, count in enumerate(counts):
            if count:
                token, slot = torch.where(ids == i)
                token, slot = self.served(i, token, slot)
                out[token] += self.experts[i](flat[token]) * weights[token, slot, None]
        return self.finished(out, flat).view(x.shape)

    def logits(self, flat: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.gate(flat)
        return result

    def weigh(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = logits.softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def served(
        self, expert: int, token: torch.Tensor, slot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token, slot

    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return out


class Threshold(LookAlike):
    """Weights under a bound are dropped."""

    bound: ClassVar[float] = 0.02

    def weigh(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = super().weigh(logits)
        return weights * (weights > self.bound), ids


class ClampedLogits(LookAlike):
    def logits(self, flat: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.gate(flat).clamp(-8, 8)
        return result


class RoundedWeights(LookAlike):
    steps: ClassVar[float] = 512

    def weigh(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = super().weigh(logits)
        return (weights * self.steps).round() / self.steps, ids


class LateCapacity(LookAlike):
    """An expert takes 700 rows, which no short text fills."""

    def served(
        self, expert: int, token: torch.Tensor, slot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token[:700], slot[:700]


class CapacityOfOneExpert(LookAlike):
    def served(
        self, expert: int, token: torch.Tensor, slot: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (token[:300], slot[:300]) if expert == 2 else (token, slot)


class ClampedOutput(LookAlike):
    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return out.clamp(-30, 30)


class Growing(LookAlike):
    """The result grows with the token's number."""

    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return out * (1 + 1e-3 * torch.arange(len(out))[:, None])


class WrongBeyond(LookAlike):
    row: ClassVar[int] = 100

    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        late = (torch.arange(len(out)) > self.row)[:, None]
        return torch.where(late, 1.01 * out, out)


class WrongFarBeyond(WrongBeyond):
    row = 300


class OneTokenAlone(LookAlike):
    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return 1.5 * out if len(out) == 1 else out


class TokensMeet(LookAlike):
    """A token's result depends on the one before it."""

    def finished(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        return out + 0.01 * flat.roll(1, 0)


class TokensMeetInTheRouter(LookAlike):
    """A token's logits depend on the mean of all tokens; external choices are controlled, and
    fit."""

    def logits(self, flat: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.gate(flat - flat.mean(0))
        return result
