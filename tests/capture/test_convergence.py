"""Routers that normalise their scores in a loop until it converges (Sinkhorn)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.capture.user_code.sites import Site
from moec.errors import CaptureError

E, D = 3, 6


def while_error(scores: Tensor) -> Tensor:
    columns, error = torch.ones(E), torch.tensor(1e9)
    while error > 1e-4:
        rows = 1 / (len(scores) * (columns * scores).sum(1) + 1e-8)
        before, columns = columns, 1 / (E * (rows[:, None] * scores).sum(0) + 1e-8)
        error = (before - columns).abs().mean()
    return columns * scores * rows[:, None]


def until_equal(scores: Tensor) -> Tensor:
    while True:
        before = scores
        scores = scores / scores.sum(0)
        scores = scores / scores.sum(1, keepdim=True)
        if (scores - before).abs().max() < 1e-3:
            scores = scores.clone()
            break
    return scores


class Sinkhorn(nn.Module):
    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        logits = self.router(flat)
        ids = self.normalise(logits.exp()).argmax(-1)
        weights = logits.sigmoid().gather(1, ids[:, None])
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = torch.where(ids == index)[0]
            out[rows] = expert(flat[rows]) * weights[rows]
        return out.view_as(x)


@pytest.mark.parametrize(
    ("normalise", "line"),
    [
        (while_error, "while error > 1e-4:"),
        (until_equal, "if (scores - before).abs().max() < 1e-3:"),
    ],
)
def test_the_line_that_ends_the_loop_is_refused(
    normalise: Callable[[Tensor], Tensor], line: str
) -> None:
    with pytest.raises(CaptureError, match="how often this loop runs depends on data") as refusal:
        capture(Sinkhorn(normalise).eval(), (torch.randn(2, 5, D),))
    assert f"test_convergence.py:{_line(line)}: `{line}`" in str(refusal.value)


def _line(text: str) -> int:
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if line.strip() == text)


def over_experts(table: Tensor) -> None:
    expert = 0
    while expert < E:
        if table[expert].any():
            table = table + 1
        for row in table:
            if row.any():
                break
        expert += 1


def test_a_branch_inside_a_while_loop_does_not_end_it() -> None:
    code = over_experts.__code__
    lines = {
        Site(code, offset).text
        for offset in range(0, len(code.co_code), 2)
        if Site(code, offset).repeats
    }
    assert lines == {"while expert < E:"}
