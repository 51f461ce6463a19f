"""Branches that no routing makes go the other way: every token takes every expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

E, D = 3, 8


class Every(nn.Module):
    def __init__(self, dispatch: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.dispatch = dispatch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dispatch(self.experts, x)


def by_counts(experts: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """The counts of a sort of all, as numbers of a list, and as ends of slices."""
    out, ids = torch.zeros_like(x), x[:, :E].argsort(-1)[:, :E]
    counts = ids.view(-1).bincount(minlength=E).tolist()
    for e in range(E):
        if counts[e] == 0:
            continue
        rows = torch.where(ids == e)[0]
        out.index_add_(0, rows, experts[e](x[rows]))
    order = ids.reshape(-1).argsort()
    ends = ids.reshape(-1).bincount(minlength=E).cpu().numpy().cumsum(0)
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        if start == end:
            continue
        rows = order[start:end] // E
        out.index_add_(0, rows, experts[e](x[rows]))
    return out


def by_rows(experts: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """The rows of numbered experts, of a sort, and of one-hot rows whose counts are tensors."""
    out, every = torch.zeros_like(x), torch.arange(E).expand(x.shape[0], -1)
    order = x[:, :E].sort(-1)[1]
    counts = nn.functional.one_hot(order.t(), E).sum((0, 1))
    for e in map(int, every.unique()):
        rows = torch.nonzero(every.reshape(-1) == e).view(-1)
        if rows.numel() > 0:
            out.index_add_(0, rows // E, experts[e](x[rows // E]))
        chosen = (order == e).any(-1)
        if not chosen.any():
            continue
        out[chosen] += experts[e](x[chosen])
        if (order == e).sum() >= 1 and counts[e] != 0:
            out = out + (order == e).sum(-1, keepdim=True) * experts[e](x)
    return out


@pytest.mark.parametrize("dispatch", [by_counts, by_rows])
def test_an_expert_that_is_never_empty_needs_no_input_that_skips_it(
    dispatch: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor],
) -> None:
    module = Every(dispatch).eval()
    captured = capture(module, (torch.randn(6, D),))
    for size in (1, 2, 9):
        x = torch.randn(size, D)
        (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
        with torch.no_grad():
            torch.testing.assert_close(actual, module(x), rtol=1e-5, atol=1e-5)


def below(limit: float) -> Callable[[nn.ModuleList, torch.Tensor], torch.Tensor]:
    """Rows with an entry beyond the limit are left out, and where all are, another number is."""

    def dispatch(experts: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        mask = x.abs().amax(-1) < limit
        if mask.any():
            rows = torch.where(mask)[0]
            return torch.zeros_like(x).index_add_(0, rows, experts[0](x[rows]))
        return x + 1

    return dispatch


def all_but(experts: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """The last expert is that of values beyond all that are drawn; otherwise it has no rows."""
    ids = x[:, :E].topk(E)[1]
    ids[(ids == E - 1) & (x[:, :E].abs() < 1e4)] = 0
    last = (ids == E - 1).any(-1)
    if last.any():
        return experts[0](x)
    return experts[1](x)


@pytest.mark.parametrize("dispatch", [below(1e4), all_but])
def test_a_branch_that_data_could_take_is_refused(
    dispatch: Callable[[nn.ModuleList, torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(CaptureError, match=r"seen to go one way only|what it reads"):
        capture(Every(dispatch).eval(), (torch.randn(6, D),))


class HitsWithoutGradient(nn.Module):
    """As transformers writes it, but for one class more than there are experts in some."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.router = classes, nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.randn(E * D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, ids = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = nn.functional.one_hot(ids, num_classes=self.classes).permute(2, 1, 0)
            hits = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for hit in hits:
            expert = hit[0]
            with torch.no_grad():
                slots, tokens = torch.where(mask[expert])
            rows = (x[tokens] @ self.up.view(E, D, D)[expert]).relu()
            out.index_add_(0, tokens, rows * scores[tokens, slots, None])
        return out


@pytest.mark.parametrize("classes", [E, E + 1])
def test_experts_that_are_hit_may_be_listed_without_gradient(classes: int) -> None:
    """torch forgets uses where it inlines the region of no_grad, and DBRX was refused."""
    module = HitsWithoutGradient(classes).eval()
    captured = capture(module, (torch.randn(5, D),))
    for tokens in (0, 1, 7):
        x = torch.randn(tokens, D)
        (result,) = evaluate(captured.program.graph, (x,), captured.program.weights)
        torch.testing.assert_close(result, module(x))
