"""Experts that read rows of a product that all of them share, computed once for all tokens, as the
low-rank experts of MixLoRA (arXiv 2404.15159) do beside the rows of the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph

D, H, E = 8, 12, 3


class LowRank(nn.Module):
    """One expert's pair of small matrices."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * self.up(self.down(x))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.base = nn.Linear(D, E, bias=False), nn.Linear(D, D)
        self.pairs = nn.ModuleList(LowRank(D, D) for _ in range(E))

    def joined(self, number: int, base: Tensor, rows: Tensor) -> Tensor:
        return torch.relu(base + self.pairs[number](rows))

    def part(self, base: Tensor, rows: Tensor, number: int) -> Tensor:
        return base[rows]

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y, base = torch.zeros_like(x), self.base(x)
        for number in range(E):
            rows, slots = torch.where(ids == number)
            out = self.joined(number, self.part(base, rows, number), x[rows])
            y.index_add_(0, rows, out * weights[rows, slots, None])
        return y


class Multiplied(Base):
    def joined(self, number: int, base: Tensor, rows: Tensor) -> Tensor:
        return base * self.pairs[number](rows).sigmoid()


class MixLoRA(nn.Module):
    """A whole feed-forward network is shared: both first products are computed once, the last one
    by each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.gates, self.ups, self.downs = (
            nn.ModuleList(LowRank(*sizes) for _ in range(E)) for sizes in ((D, H), (D, H), (H, D))
        )
        self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        gate, up = self.w1(x), self.w3(x)
        results = []
        for number in range(E):
            _, rows = torch.where(mask[number])
            picked = x[None, rows].reshape(-1, D)
            first = gate[None, rows].reshape(-1, H) + self.gates[number](picked)
            second = up[None, rows].reshape(-1, H) + self.ups[number](picked)
            hidden = F.silu(first) * second
            results.append(self.w2(hidden) + self.downs[number](hidden))
        y = torch.zeros_like(x)
        for number in range(E):
            slots, rows = torch.where(mask[number])
            y.index_add_(0, rows, results[number] * weights[rows, slots, None])
        return y


class OtherOrder(Base):
    def part(self, base: Tensor, rows: Tensor, number: int) -> Tensor:
        return base[rows.flip(0)]


class OtherTokens(Base):
    def part(self, base: Tensor, rows: Tensor, number: int) -> Tensor:
        return base.roll(1, 0)[rows]


class OneDoubled(Base):
    """Only the last expert doubles the shared rows."""

    def part(self, base: Tensor, rows: Tensor, number: int) -> Tensor:
        return base[rows] * (1.0 + (number == E - 1))


class OneReadsTheGate(Base):
    """The last expert joins another product of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        y, bases = torch.zeros_like(x), (self.base(x), self.base(x), self.other(x))
        for number, base in enumerate(bases):
            rows, slots = torch.where(ids == number)
            out = self.joined(number, base[rows], x[rows])
            y.index_add_(0, rows, out * weights[rows, slots, None])
        return y


def compile_and_compare(kind: type[nn.Module]) -> moec.CompiledModel:
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    program = compiled.pass_results[-1].program
    for count in (1, 17):
        x = torch.randn(count, D)
        with torch.no_grad():
            torch.testing.assert_close(
                evaluate(program.graph, [x], program.weights)[0], module(x), rtol=1e-5, atol=1e-6
            )
    return compiled


@pytest.mark.parametrize("kind", [Base, Multiplied, MixLoRA])
def test_rows_of_the_product_are_dispatched_beside_the_tokens(kind: type[nn.Module]) -> None:
    compiled = compile_and_compare(kind)
    assert [(block.experts, block.top_k) for block in compiled.blocks] == [(E, 2)]


def test_the_product_is_computed_once() -> None:
    texts = [print_graph(r.program.graph) for r in compile_and_compare(Base).pass_results]
    text = next(t for t in texts if "moe.experts" in t)
    before, _, block = text.partition("moe.dispatch")
    assert before.count("aten.cat.default") == 1
    assert f"f32[T, {2 * D}]" in before
    assert "graph body(rows: f32[R, 16]" in block


@pytest.mark.parametrize("kind", [OtherOrder, OtherTokens, OneDoubled, OneReadsTheGate])
def test_rows_of_other_tokens_or_products_are_no_shared_rows(kind: type[nn.Module]) -> None:
    assert compile_and_compare(kind).blocks == ()


def test_rows_of_other_tokens_are_named() -> None:
    reason = compile_and_compare(OtherOrder).declined[0].reason
    assert "aten.add.Tensor joins rows of an expert with rows of " in reason
    assert "a product that all experts share: they are rows of other tokens" in reason


def test_machine_code() -> None:
    torch.manual_seed(0)
    module = Base().eval()
    x = torch.randn(7, D)
    with torch.no_grad():
        torch.testing.assert_close(moec.compile(module, (x,))(x), module(x), rtol=1e-4, atol=1e-5)


class Scaled(nn.Module):
    """Experts that multiply their rows by a number, which is no row."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        ids = self.gate(x).argmax(-1)
        order = ids.argsort()
        ends, parts, start = ids.bincount(minlength=4).cumsum(0).tolist(), [], 0
        for e, expert in enumerate(self.experts):
            parts.append(expert(x[order[start : ends[e]]] * scale))
            start = ends[e]
        return torch.cat(parts)[order.argsort()]


def test_a_number_beside_rows() -> None:
    module, inputs = Scaled().eval(), [torch.randn(20, 8), torch.tensor(2.0)]
    compiled = moec.compile(module, (inputs[0][:6], inputs[1]), build=False, verify=False)
    assert compiled.blocks == ()
    program = compiled.pass_results[-1].program
    with torch.no_grad():
        (y,) = evaluate(program.graph, inputs, program.weights)
        torch.testing.assert_close(y, module(*inputs))
