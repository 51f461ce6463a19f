"""Gates that weigh the same experts, x[T, D] -> one result [T, D] for each task: the mixtures of
recommenders. MMoE: Ma et al. 2018; CGC and PLE: Tang et al. 2020; DSelect-k: Hazimeh et al. 2021
(arXiv 2106.03760)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp
from tests.passes.forms.sizes import D, E

TASKS = 3
Weigh = Callable[[Tensor, Tensor], Tensor]

WEIGH: dict[str, Weigh] = {
    "sum": lambda w, y: (w.unsqueeze(-1) * y).sum(1),
    "expanded": lambda w, y: (w.unsqueeze(-1).expand(-1, -1, y.shape[-1]) * y).sum(1),
    "matmul": lambda w, y: (w.unsqueeze(1) @ y).squeeze(1),
    "bmm": lambda w, y: torch.bmm(w.unsqueeze(1), y).squeeze(1),
    "columns": lambda w, y: torch.bmm(y.transpose(1, 2), w.unsqueeze(2)).squeeze(2),
    "einsum": lambda w, y: torch.einsum("te,ted->td", w, y),
}
"""Weights [T, E] and results [T, E, D] -> [T, D]."""


class MultiGate(nn.Module):
    """A gate for each task weighs all experts."""

    def __init__(self, weigh: Weigh = WEIGH["sum"], count: int = E) -> None:
        super().__init__()
        self.weigh = weigh
        self.experts = nn.ModuleList(Mlp() for _ in range(count))
        self.gates = nn.ModuleList(nn.Linear(D, count, bias=False) for _ in range(TASKS))

    def shares(self, gate: nn.Module, x: Tensor) -> Tensor:
        return gate(x).softmax(-1)

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        return tuple(self.weigh(self.shares(gate, x), results) for gate in self.gates)


class Normed(MultiGate):
    """The experts have batch norms, as those of recommenders: roots of variances that no weight of
    a random draw may make negative."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, D))
            for _ in range(E)
        )
        for expert in self.experts:
            nn.init.uniform_(expert[1].running_var, 0.5, 2.0)  # type: ignore[index]


class LastAxis(MultiGate):
    """The experts lie on the last axis."""

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], -1)
        return tuple((results * self.shares(g, x)[:, None]).sum(-1) for g in self.gates)


class GateLoop(MultiGate):
    """Sums of products, one expert after the other."""

    def forward(self, x: Tensor) -> Any:
        results = [expert(x) for expert in self.experts]
        shares = [self.shares(gate, x) for gate in self.gates]
        return tuple(sum(w[:, i : i + 1] * y for i, y in enumerate(results)) for w in shares)


class OneGateTensor(MultiGate):
    """The logits of all gates are one product."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Linear(D, TASKS * E)

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        shares = self.all(x).view(-1, TASKS, E).softmax(-1)
        return tuple((shares[:, i, :, None] * results).sum(1) for i in range(TASKS))


class BinaryCodes(MultiGate):
    """DSelect-k: each of two selectors chooses an expert by the bits of its number, with smooth
    steps for bits, and a softmax weighs the selectors."""

    def __init__(self) -> None:
        super().__init__()
        bits = [[number >> bit & 1 for bit in range(2)] for number in range(E)]
        self.codes: Tensor
        self.register_buffer("codes", torch.tensor(bits).bool())
        self.selectors = nn.ModuleList(nn.Linear(D, 4) for _ in range(TASKS))
        self.gates = nn.ModuleList(nn.Linear(D, 2) for _ in range(TASKS))

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        outputs = []
        for selector, gate in zip(self.selectors, self.gates, strict=True):
            z = selector(x).view(-1, 2, 1, 2)
            step = torch.where(z < -0.5, 0.0, torch.where(z > 0.5, 1.0, -2 * z**3 + 1.5 * z + 0.5))
            each = torch.where(self.codes, step, 1 - step).prod(-1)
            shares = (gate(x).softmax(-1)[:, :, None] * each).sum(1)
            outputs.append(self.weigh(shares, results))
        return tuple(outputs)


class Customised(nn.Module):
    """CGC: the gate of a task weighs the experts of the task and the shared ones. With `every`, one
    more gate weighs all, as between the levels of PLE."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(nn.ModuleList(Mlp() for _ in range(2)) for _ in range(2))
        self.shared = nn.ModuleList(Mlp() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(D, 4) for _ in range(2))
        self.gate = nn.Linear(D, 6) if every else None

    def forward(self, x: Tensor) -> Any:
        shared = [expert(x) for expert in self.shared]
        tasks = [[expert(x) for expert in experts] for experts in self.tasks]
        banks = [(gate, experts + shared) for gate, experts in zip(self.gates, tasks, strict=True)]
        if self.gate is not None:
            banks.append((self.gate, [*tasks[0], *tasks[1], *shared]))
        return tuple(
            (gate(x).softmax(-1).unsqueeze(-1) * torch.stack(results, 1)).sum(1)
            for gate, results in banks
        )


class NormedTasks(Customised):
    """Each task's gate and experts, which have batch norms, run after those of the task before."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((self.shared, 0), (self.shared, 1), *((t, n) for t in self.tasks for n in (0, 1)))
        for experts, number in pairs:
            norm = nn.BatchNorm1d(8)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            experts[number] = nn.Sequential(nn.Linear(D, 8), norm, nn.ReLU(), nn.Linear(8, D))

    def forward(self, x: Tensor) -> Any:
        shared = [expert(x) for expert in self.shared]
        sums = []
        for gate, experts in zip(self.gates, self.tasks, strict=True):
            results = torch.stack([*(expert(x) for expert in experts), *shared], 1)
            sums.append((gate(x).softmax(-1).unsqueeze(-1) * results).sum(1))
        return tuple(sums)


class Rectified(MultiGate):
    """What looks like a part of the experts acts on the weighed results, and weights may be
    negative."""

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        return tuple((gate(x).unsqueeze(-1) * results).relu().sum(1) for gate in self.gates)


class Centred(MultiGate):
    """The results of an expert depend on those of the others."""

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        results = results - results.mean(1, keepdim=True)
        return tuple(self.weigh(self.shares(gate, x), results) for gate in self.gates)


class OtherRows(MultiGate):
    """One of the experts reads other rows."""

    def forward(self, x: Tensor) -> Any:
        rows = [x] * (E - 1) + [x.sin()]
        results = [expert(row) for expert, row in zip(self.experts, rows, strict=True)]
        return tuple(self.weigh(self.shares(g, x), torch.stack(results, 1)) for g in self.gates)


class OfTokens(MultiGate):
    """Weights of tokens, not of experts: each result sums the tokens of an expert."""

    def forward(self, x: Tensor) -> Any:
        results = torch.stack([expert(x) for expert in self.experts], 1)
        return tuple((gate(x).softmax(0).unsqueeze(-1) * results).sum(0) for gate in self.gates)
