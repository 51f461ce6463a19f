"""Gates at two levels over the columns of one value are one node, lowered to one softmax."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph

D = 4
PARTS = {"unequal": (2, 4, 3), "equal": (2, 2, 2), "last is short": (3, 3, 2)}


class TwoLevels(nn.Module):
    """x [T, D] -> [T]: groups of rewards, weighed by an outer and by inner softmaxes."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__()
        self.parts, count = parts, sum(parts)
        self.rewards, self.inner = nn.Linear(D, count), nn.Linear(D, count)
        self.outer = nn.Linear(D, len(parts))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def terms(self, x: Tensor, shares: Tensor) -> list[Tensor]:
        rewards, logits, start, terms = self.rewards(x), self.inner(x), 0, []
        for group, size in enumerate(self.parts):
            part = slice(start, start + size)
            inner = self.scale * logits[:, part].softmax(-1)
            terms.append(shares[:, group] * (inner * rewards[:, part]).sum(-1))
            start += size
        return terms

    def forward(self, x: Tensor) -> Any:
        return sum(self.terms(x, self.outer(x).softmax(-1)))


class Overlapping(TwoLevels):
    """A reward belongs to two groups."""

    def forward(self, x: Tensor) -> Any:
        rewards, logits = self.rewards(x), self.inner(x)
        shares = self.outer(x).softmax(-1)
        first, other = slice(0, 4), slice(3, 6)
        return shares[:, 0] * (logits[:, first].softmax(-1) * rewards[:, first]).sum(-1) + (
            shares[:, 1] * (logits[:, other].softmax(-1) * rewards[:, other]).sum(-1)
        )


class OtherScales(TwoLevels):
    """A factor of each group's own."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__(parts)
        self.more = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Any:
        shares = self.outer(x).softmax(-1)
        first = self.terms(x, shares)[0]
        self.scale, self.more = self.more, self.scale
        total = first + self.terms(x, shares)[1]
        self.scale, self.more = self.more, self.scale
        return total


class Exchanged(TwoLevels):
    """The logits of one group weigh the rewards of another."""

    def forward(self, x: Tensor) -> Any:
        rewards, logits = self.rewards(x), self.inner(x)
        shares = self.outer(x).softmax(-1)
        first, other = slice(0, 3), slice(3, 6)
        return shares[:, 0] * (logits[:, other].softmax(-1) * rewards[:, first]).sum(-1) + (
            shares[:, 1] * (logits[:, first].softmax(-1) * rewards[:, other]).sum(-1)
        )


REFUSED = {
    "Overlapping": (Overlapping((3, 3)), "its groups are not all columns of"),
    "OtherScales": (OtherScales((3, 3)), "its groups are multiplied by different values"),
    "Exchanged": (Exchanged((3, 3)), "its groups are not all columns of"),
}


@functools.cache
def steps(parts: tuple[int, ...]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = TwoLevels(parts).eval()
    return module, moec.compile(module, (torch.randn(3, D),), stop_after="expand-hierarchies")


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_one_node_and_back(parts: tuple[int, ...]) -> None:
    module, compiled = steps(parts)
    by_name = {step.name: step.program for step in compiled.pass_results}
    node, lowered = by_name["recognise-hierarchies"], by_name["expand-hierarchies"]
    (op,) = [op for op in node.graph.ops if op.name == "moe.hierarchy"]
    assert op.attrs["groups"] == parts
    names = [op.name for op in lowered.graph.ops]
    assert "moe.hierarchy" not in names
    assert names.count("aten.softmax.int") == 2  # the outer gate's, and one of all groups
    (block,) = compiled.blocks
    assert (block.experts, block.router) == (
        sum(parts),
        "softmax within 3 groups, each weighed",
    )
    for rows in (1, 5):
        x = 10 * torch.randn(rows, D)  # sharp softmaxes: a padded share would show
        with torch.no_grad():
            expected = module(x)
        for program in (node, lowered):
            (y,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    text = print_graph(node.graph)
    assert print_graph(parse(text)) == text


@pytest.mark.parametrize("name", ["recognise-hierarchies", "expand-hierarchies"])
def test_text(golden: Any, name: str) -> None:
    _, compiled = steps(PARTS["unequal"])
    (step,) = [step for step in compiled.pass_results if step.name == name]
    golden(print_graph(step.program.graph))


def test_kernels_equal_eager() -> None:
    module, _ = steps(PARTS["unequal"])
    rows = torch.export.Dim("T")
    compiled = moec.compile(
        module, (torch.randn(3, D),), dynamic_shapes=({0: rows},), verify=False, kv_cache=False
    )
    for count in (0, 1, 7):
        x = torch.randn(count, D)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    module, words = REFUSED[name]
    compiled = moec.compile(module.eval(), (torch.randn(3, D),), stop_after="expand-hierarchies")
    assert not [op for op in compiled.graph.ops if op.name == "moe.hierarchy"]
    (declined,) = [d for d in compiled.declined if d.rule == "recognise-hierarchies"]
    assert declined.reason.startswith(f"gates at two levels: {words}")
