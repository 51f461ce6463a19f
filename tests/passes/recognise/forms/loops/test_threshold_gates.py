"""Gates that a threshold opens, any number of them for each token (DynMoE, arXiv 2405.14297): each
expert reads the tokens for which its weight is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph

D, E = 8, 4


class TopAny(nn.Module):
    """Experts whose similarity exceeds their threshold; the most similar one where none does."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity = nn.Parameter(torch.randn(D, E))
        self.thresholds = nn.Parameter(torch.zeros(E))
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(F.normalize(x, dim=1) @ F.normalize(self.similarity, dim=0))
        active = (scores > torch.sigmoid(self.thresholds)).to(x.dtype)
        none = active.sum(1, keepdim=True) == 0
        active = torch.where(none, F.one_hot(scores.argmax(1), E).to(x.dtype), active)
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (active[..., None] * y).sum(1) / active.sum(1, keepdim=True)


class OwnRows(nn.Module):
    """A loop in which each expert reads the tokens whose score exceeds its threshold, with the
    temperature of the scores clamped, as DynMoE's is."""

    def __init__(self) -> None:
        super().__init__()
        self.similarity = nn.Parameter(torch.randn(D, E))
        self.thresholds = nn.Parameter(torch.zeros(E))
        self.temperature = nn.Parameter(torch.tensor([0.7]))
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.temperature.clamp(max=4.6).exp()
        cosines = F.normalize(x, dim=1) @ F.normalize(self.similarity, dim=0)
        return torch.sigmoid(cosines * scale), torch.sigmoid(self.thresholds * scale)

    def active(self, x: Tensor) -> Tensor:
        scores, limits = self.scores(x)
        active = F.relu(scores - limits).sign()
        best = F.one_hot(scores.argmax(1), E).to(x.dtype)
        return torch.where(active.sum(1, keepdim=True) == 0, best, active)

    def opened(self, active: Tensor, number: int) -> Tensor:
        return active[:, number] > 0

    def forward(self, x: Tensor) -> Tensor:
        active, y = self.active(x), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(self.opened(active, number))[0]
            y.index_add_(0, rows, expert(x[rows]))
        return y / active.sum(1, keepdim=True)


class Booleans(OwnRows):
    """A table of booleans, and weights: tokens without an expert get zero."""

    def forward(self, x: Tensor) -> Tensor:
        scores, limits = self.scores(x)
        table, y = scores > limits, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(table[:, number])[0]
            y.index_add_(0, rows, expert(x[rows]) * scores[rows, number, None])
        return y


class EveryToken(OwnRows):
    """Every expert for every token, weighed by a column of the table."""

    def forward(self, x: Tensor) -> Tensor:
        active = self.active(x)
        results = [active[:, i, None] * expert(x) for i, expert in enumerate(self.experts)]
        return sum(results[1:], results[0]) / active.sum(1, keepdim=True)


class Mass(OwnRows):
    """The likeliest experts up to a mass of 0.6, in the order of a sort."""

    def forward(self, x: Tensor) -> Tensor:
        scores, order = (x @ self.similarity).softmax(-1).sort(-1, descending=True)
        scores = scores * (scores.cumsum(-1) - scores < 0.6)
        table, y = torch.zeros_like(scores).scatter(1, order, scores), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + table[:, number, None] * expert(x)
        return y


class OtherLimit(OwnRows):
    """The last expert has a threshold of its own."""

    def opened(self, active: Tensor, number: int) -> Tensor:
        return active[:, number] > (0.0 if number < E - 1 else 1.5)


class OtherColumn(OwnRows):
    """The experts are in another order than the columns of the table that open them."""

    def opened(self, active: Tensor, number: int) -> Tensor:
        return active[:, (number + 1) % E] > 0


@pytest.mark.parametrize("kind", [OwnRows, Booleans, EveryToken, Mass, OtherLimit, OtherColumn])
def test_loops_over_the_columns_of_a_table(kind: type[nn.Module]) -> None:
    """All are right; those whose experts compare a table in one way are blocks."""
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    program = compiled.pass_results[-1].program
    for rows in (1, 64):
        x = torch.randn(rows, D)
        with torch.no_grad():
            (y,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
    expected = [] if kind is OtherLimit else [(E, E)]
    assert [(block.experts, block.top_k) for block in compiled.blocks] == expected


class Best(nn.Module):
    """All experts that score as much as the second best: of equal ones more than two. What else
    is added to the scores may be taken for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.other = nn.Linear(D, E, bias=False), nn.Linear(D, E, bias=False)
        self.tasks = nn.Embedding.from_pretrained(torch.randn(3, E).round())
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def second(self, rows: int) -> Tensor:
        return torch.randn(rows, E).round()

    def logits(self, x: Tensor, prior: Tensor) -> Tensor:
        return self.gate(x) + prior

    def forward(self, x: Tensor, second: Tensor) -> Tensor:
        scores = self.logits(x, second).softmax(-1)
        least = scores.topk(2, dim=-1)[0][:, -1:]
        table = torch.where(scores < least, 0.0, scores)
        table = table / table.sum(-1, keepdim=True)
        return sum(table[:, i, None] * expert(x) for i, expert in enumerate(self.experts))


class BestOfNoisy(Best):
    def logits(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.gate(x) + noise * F.softplus(self.other(x))


class BestOfTask(Best):
    def second(self, rows: int) -> Tensor:
        return torch.arange(rows) % 3

    def logits(self, x: Tensor, task: Tensor) -> Tensor:
        return self.gate(x) + self.tasks(task)


@pytest.mark.parametrize("kind", [Best, BestOfNoisy, BestOfTask])
def test_equal_scores_beside_tokens(kind: type[Best]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(
        module, (torch.randn(6, D), module.second(6)), build=False, verify=False
    )
    assert compiled.blocks == ()
    assert "the numbers differ" in compiled.declined[0].reason
    program = compiled.pass_results[-1].program
    for x in (torch.zeros(64, D), torch.randn(64, D)):
        second = module.second(64)
        with torch.no_grad():
            (y,) = evaluate(program.graph, [x, second], program.weights)
            torch.testing.assert_close(y, module(x, second), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return TopAny().eval()


@pytest.fixture(scope="module")
def compiled(module: nn.Module) -> moec.CompiledModel:
    return moec.compile(module, (torch.randn(6, D),), build=False)


def test_one_block_without_rows_of_closed_gates(compiled: moec.CompiledModel) -> None:
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, E)]
    texts = [print_graph(result.program.graph) for result in compiled.pass_results]
    assert any('form="experts whose weight is not zero"' in text for text in texts)


@pytest.mark.parametrize("rows", [1, 17, 64])
def test_numbers(compiled: moec.CompiledModel, module: nn.Module, rows: int) -> None:
    """64 rows contain some for which no gate is open."""
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(rows))
    program = compiled.pass_results[-1].program
    (y,) = evaluate(program.graph, [x], program.weights)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-6)
