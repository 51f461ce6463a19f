"""Results of choices that no block sums, and ids and weights that a proof must draw as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.ir.interpret.evaluate import evaluate

D, E, K = 8, 4, 2


class Slots(nn.Module):
    """A result for each choice, [T, k, D], which are weighed by slot."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def choose(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1).topk(K).indices

    def combine(self, y: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        return torch.einsum("tkd,tk->td", y, logits.softmax(-1).gather(1, ids))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        ids = self.choose(logits)
        y = x.new_zeros(x.shape[0], ids.shape[1], D)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y[token, slot] = expert(x[token])
        return self.combine(y, logits, ids)


class Ascending(Slots):
    def choose(self, logits: Tensor) -> Tensor:
        return logits.argsort(-1)[:, -K:]


class Swapped(Slots):
    def choose(self, logits: Tensor) -> Tensor:
        return torch.stack(super().choose(logits).unbind(1)[::-1], 1)


class SideBySide(Swapped):
    def combine(self, y: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        return torch.cat([y[:, 0], y[:, 1]], -1)


class Worst(Slots):
    """All experts, the best last."""

    def choose(self, logits: Tensor) -> Tensor:
        return (-logits).topk(E).indices


class Balanced(Slots):
    """All experts, in the order of probabilities that are balanced over the tokens."""

    def choose(self, logits: Tensor) -> Tensor:
        cost = logits.exp()
        for _ in range(2):
            cost = cost / cost.sum(0, keepdim=True)
            cost = cost / cost.sum(1, keepdim=True)
        return cost.topk(E).indices


class Filled(Slots):
    """All experts, each for the first tokens alone: counted slot by slot, from ids [k, T]."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(E)
        hot = F.one_hot(ids.t().reshape(-1), E)
        within = (hot.cumsum(0) * hot).sum(-1).view(E, -1).t() <= x.shape[0] // 2 + 1
        full = x.new_zeros(x.shape[0], E).scatter(1, ids, weights * within)
        return torch.einsum("te,etd->td", full, torch.stack([e(x) for e in self.experts]))


class Bent(Slots):
    """A function of each weighted result."""

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.weigh(self.gate(x))
        ids = scores.abs().topk(K).indices
        y = torch.stack([e(x) for e in self.experts], 1).gather(1, ids[..., None].expand(-1, -1, D))
        return (y * scores.gather(1, ids)[..., None]).relu().sum(1)


class Negative(Bent):
    """Scores of both signs: a relu of the experts' results alone is another function."""

    def weigh(self, logits: Tensor) -> Tensor:
        return logits.tanh()


class Ranked(Worst):
    """Weights by place, the worst expert first: those of another order are other weights."""

    def forward(self, x: Tensor) -> Tensor:
        ids = self.choose(self.gate(x))
        weights = torch.linspace(0.1, 1, E).expand(x.shape[0], E)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


FORMS = (Slots, Ascending, Swapped, SideBySide, Filled, Bent, Worst, Balanced, Negative, Ranked)


@pytest.mark.parametrize("form", FORMS)
def test_results_by_slot(form: type[Slots]) -> None:
    torch.manual_seed(0)
    module = form().eval()
    model = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    routers = [block.router == "custom" for block in model.blocks]
    assert routers == ([] if form is Negative else [form is Ascending])
    program, x = model.pass_results[-1].program, torch.randn(50, D)
    with torch.no_grad():
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-5)


class Both(Swapped):
    """The same choices for results by slot and for results that a block sums."""

    def combine(self, y: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        weights, rows = logits.softmax(-1).gather(1, ids), logits.tanh()
        total = torch.zeros_like(rows)
        for e, expert in enumerate(self.others):
            token, slot = torch.where(ids == e)
            total.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return torch.cat([y[:, 0], y[:, 1], total], -1)

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(E, E) for _ in range(E)])


def test_choices_that_another_block_sums() -> None:
    torch.manual_seed(0)
    module = Both().eval()
    model = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    words = "softmax, top-2, some choices replaced"
    assert [block.router for block in model.blocks] == [words, f"{words}, weights of its own"]
    program, x = model.pass_results[-1].program, torch.randn(50, D)
    with torch.no_grad():
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-5)
