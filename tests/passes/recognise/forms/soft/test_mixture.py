"""Experts of different kinds weighted by a softmax are one node, and are expanded again later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph

D = 4


class Kinds(nn.Module):
    """Three experts of different graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entry = nn.Linear(D, 3), nn.Linear(D, D)
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def experts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x).sigmoid(), self.c(F.gelu(self.b(x))), x.cos()

    def forward(self, x: Tensor) -> Any:
        x = self.entry(x)
        shares = self.gate(x).softmax(-1)
        return sum(shares[:, i, None] * y for i, y in enumerate(self.experts(x)))


class Residual(Kinds):
    """Something else is a part of the sum."""

    def forward(self, x: Tensor) -> Any:
        return x + super().forward(x) * 1


class Swapped(Kinds):
    """The weights come in another order."""

    def forward(self, x: Tensor) -> Any:
        x = self.entry(x)
        shares = self.gate(x).softmax(-1)
        y = self.experts(x)
        return shares[:, 2:3] * y[0] + shares[:, 0:1] * y[1] + y[2] * shares[:, 1:2]


class SomeShares(Kinds):
    """One of the shares weighs nothing."""

    def forward(self, x: Tensor) -> Any:
        shares = self.gate(x).softmax(-1)
        a, b, _ = self.experts(x)
        return shares[:, 0, None] * a + shares[:, 1, None] * b


class ReadByOthers(Kinds):
    """An expert's result is a result of the model too."""

    def forward(self, x: Tensor) -> Any:
        shares = self.gate(x).softmax(-1)
        experts = self.experts(x)
        return sum(shares[:, i, None] * y for i, y in enumerate(experts)), experts[0]


def steps(module: nn.Module) -> Any:
    torch.manual_seed(0)
    return moec.compile(module.eval(), (torch.randn(3, D),), stop_after="expand-mixtures")


@pytest.mark.parametrize("kind", [Kinds, Residual, Swapped])
def test_one_node_and_back(kind: type[nn.Module]) -> None:
    module = kind()
    result = steps(module)
    by_name = {step.name: step.program for step in result.pass_results}
    node, out = by_name["recognise-mixtures"], by_name["expand-mixtures"]
    assert [op.name for op in node.graph.ops].count("moe.mixture") == 1
    assert not any(op.name == "moe.mixture" for op in out.graph.ops)
    (block,) = result.blocks
    assert (block.experts, block.top_k, block.router) == (3, 3, "softmax, all")
    x = torch.randn(5, D)
    with torch.no_grad():
        right = module(x)
    for program in (node, out):
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, right, rtol=1e-6, atol=1e-6)
    text = print_graph(node.graph)
    assert print_graph(parse(text)) == text


def test_text(golden: Any) -> None:
    step = next(s for s in steps(Kinds()).pass_results if s.name == "recognise-mixtures")
    golden(print_graph(step.program.graph))


def test_a_share_that_weighs_nothing() -> None:
    assert steps(SomeShares()).blocks == ()


def test_a_result_that_others_read() -> None:
    result = steps(ReadByOthers())
    assert result.blocks == ()
    (declined,) = [d for d in result.declined if d.rule == "recognise-mixtures"]
    assert declined.reason == "the output of one of its experts is read by other ops too"


class ReadsItsShares(Kinds):
    """An expert computes with the weights, or with what they are made of."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor) -> Any:
        logits = self.gate(x)
        shares = logits.softmax(-1)
        every = [shares[:, i, None] for i in range(3)]
        a, b, c = self.experts(x)
        a = a * {
            "one": shares[:, :1], "sum": shares.sum(-1, keepdim=True), "logits": logits[:, :1],
            "every": every[0] - every[1] * every[2],
        }[self.reads].tanh()  # fmt: skip
        return every[0] * a + every[1] * b + every[2] * c


def check(module: nn.Module, example: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    compiled = moec.compile(module.eval(), example, build=False, verify=False)
    program = compiled.pass_results[-1].program
    (y,) = evaluate(program.graph, inputs, program.weights)
    with torch.no_grad():
        torch.testing.assert_close(y, module(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads", ["one", "sum", "logits", "every"])
def test_an_expert_that_reads_the_shares(reads: str) -> None:
    """Where it reads every one, the softmax went into the node that has it as an input."""
    check(ReadsItsShares(reads), (torch.randn(3, D),), (torch.randn(5, D),))


class LikeRows(Kinds):
    """An expert is as large as chosen rows of another input, and reads nothing else of them."""

    def forward(self, x: Tensor, other: Tensor) -> Any:
        shares = self.gate(x).softmax(-1)
        a, b, c = self.experts(x)
        rows = other[(other[:, 0] > 0).nonzero()[:, 0]]
        out = torch.zeros_like(a).index_add(0, torch.arange(rows.shape[0]), torch.zeros_like(rows))
        return shares[:, 0, None] * (a + out) + shares[:, 1, None] * b + shares[:, 2, None] * c


def test_an_expert_that_reads_only_a_shape() -> None:
    inputs = [(torch.randn(n, D), torch.randn(n, D)) for n in (6, 9)]
    check(LikeRows(), *inputs)
