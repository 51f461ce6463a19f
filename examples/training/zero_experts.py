"""A trainable MoE++ layer: experts without a network, their capacities and their balance loss.

MoE++ (arXiv 2410.07348). The compiler recognises this layer as it does those of others: a trained
layer compiles without changes, and no rows are dispatched for experts without a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.errors import UsageError


def balance_loss(logits: Tensor, ids: Tensor, networks: int, tau: float) -> Tensor:
    """The heterogeneous balance loss, equation 8: sum over i of eta_i * f_i * P_i.

    `logits` [T, N], `ids` [T, k]. f_i is the share of the tokens that chose expert i, P_i the mean
    of its probability; eta_i is 1 for the first `networks` experts and `tau` for the others, so
    that at its minimum (with f equal to P) a network is chosen tau times as often.
    """
    count = logits.shape[-1]
    chosen = F.one_hot(ids, count).sum(-2).to(logits.dtype).mean(0)
    eta = torch.ones(count, dtype=logits.dtype, device=logits.device)
    eta[networks:] = tau
    return (eta * chosen * logits.softmax(-1).mean(0)).sum()


def capacities(slots: int, networks: int, others: int, tau: float, gamma: float) -> tuple[int, int]:
    """How many choices an expert with a network accepts, and one without: equation 9.

    The paper's T is the number of choices here, k per token, so that with gamma = 1 all choices fit
    if they are distributed as at the minimum of the balance loss.
    """
    unit = gamma * slots / (tau * networks + others)
    return math.ceil(unit * tau), math.ceil(unit)


def within_limits(ids: Tensor, limits: Tensor) -> Tensor:
    """bool[T, k]: whether a choice is among its expert's first `limits`[N] choices, by token."""
    hot = F.one_hot(ids.flatten(), len(limits))
    before = ((hot.cumsum(0) - hot) * hot).sum(-1)
    return (before < limits[ids.flatten()]).reshape(ids.shape)


class SwiGLU(nn.Module):
    """x[R, D] -> [R, D]"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Copy(nn.Module):
    """Equation 4: x."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ConstantExpert(nn.Module):
    """Equation 5: a * x + b * v with (a, b) = softmax(W x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 2, bias=False)
        self.vector = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.mix(x).softmax(-1)
        y: Tensor = alpha[:, :1] * x + alpha[:, 1:] * self.vector
        return y


class MoEPlusPlus(nn.Module):
    """x[T, D], the logits[T, N] of the previous layer? -> y[T, D], logits[T, N].

    N = networks + copy + constant + zero, in this order. The logits of the previous layer are added
    to this layer's after a linear map (gating residual, equation 6). In training mode, choices
    beyond an expert's capacity add nothing, and `loss` is the balance loss of the last call (its
    weight in the paper is 0.01). Raises UsageError for invalid sizes.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        networks: int,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        k: int = 2,
        tau: float = 0.75,
        gamma: float = 1.1,
        expert: Callable[[int, int], nn.Module] = SwiGLU,
    ) -> None:
        super().__init__()
        count = networks + zero + copy + constant
        if min(width, hidden, networks) < 1 or min(zero, copy, constant) < 0 or not 0 < k <= count:
            raise UsageError(
                f"MoEPlusPlus: width={width}, hidden={hidden}, networks={networks}, zero={zero}, "
                f"copy={copy}, constant={constant}, k={k}: give sizes of at least 1, counts of at "
                "least 0, and k of at most all experts"
            )
        if tau <= 0 or gamma <= 0:
            raise UsageError(f"MoEPlusPlus: tau={tau}, gamma={gamma}: give numbers above 0")
        self.networks, self.others, self.k = networks, zero + copy + constant, k
        self.tau, self.gamma = tau, gamma
        self.router = nn.Linear(width, count, bias=False)
        self.residual = nn.Linear(count, count, bias=False)
        nn.init.zeros_(self.residual.weight)
        self.experts = nn.ModuleList(
            [
                *(expert(width, hidden) for _ in range(networks)),
                *(Copy() for _ in range(copy)),
                *(ConstantExpert(width) for _ in range(constant)),
            ]
        )
        self.loss = torch.zeros(())

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if before is not None:
            logits = logits + self.residual(before)
        weights, ids = logits.softmax(-1).topk(self.k, dim=-1)
        if self.training:
            self.loss = balance_loss(logits, ids, self.networks, self.tau)
            weights = weights * within_limits(ids, self._limits(ids)).to(weights.dtype)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == number)
            y = y.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return y, logits

    def _limits(self, ids: Tensor) -> Tensor:
        per_expert, other = capacities(
            ids.numel(), self.networks, self.others, self.tau, self.gamma
        )
        return torch.tensor([per_expert] * self.networks + [other] * self.others, device=ids.device)
