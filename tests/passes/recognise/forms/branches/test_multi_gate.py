"""Gates that weigh the same experts are blocks over experts that run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.capture import capture
from moec.ir.graph import Graph, Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph
from moec.passes.core import runner
from moec.passes.core.runner import Declined
from moec.pipeline import CANONICALISE, LOWER, RECOGNISE, SIMPLIFY
from moec.report.blocks import blocks
from moec.report.data import Block
from tests.passes.forms import multi_gate, others
from tests.passes.forms.sizes import D

Form = Callable[[], nn.Module]
FORMS: dict[str, Form] = {
    **{name: lambda w=weigh: multi_gate.MultiGate(w) for name, weigh in multi_gate.WEIGH.items()},  # type: ignore[misc]
    "last axis": multi_gate.LastAxis,
    "loop": multi_gate.GateLoop,
    "one tensor": multi_gate.OneGateTensor,
    "binary codes": multi_gate.BinaryCodes,
}


def run(form: Form) -> tuple[Program, Program, tuple[Block, ...], list[Declined]]:
    """The graphs after recognition and after all passes, the blocks, and the reasons of others.
    Both graphs give the numbers of eager, in float32: their sums have at most 32 terms."""
    torch.manual_seed(0)
    captured = capture(form().eval(), (torch.randn(6, D),))
    passes = [p for phase in (CANONICALISE, RECOGNISE, SIMPLIFY, LOWER) for p in phase.passes]
    steps = runner.run(captured.program, passes)
    simple = next(step.program for step in steps if step.name == "share-experts")
    for count in (0, 1, 2, 9):
        rows = torch.randn(count, D)
        for program in (simple, steps[-1].program):
            actual = evaluate(program.graph, [rows], program.weights)
            for a, b in zip(actual, captured.eager(rows), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    declined = [d for step in steps for d in step.declined]
    return simple, steps[-1].program, blocks(simple.graph), declined


def names(graph: Graph, name: str) -> int:
    return [op.name for op in graph.ops].count(name)


@pytest.mark.parametrize("form", FORMS)
def test_experts_of_all_gates_run_once(form: str) -> None:
    simple, lowered, (block,), declined = run(FORMS[form])
    router = "custom" if form == "binary codes" else "softmax"
    assert block.router == f"{router}, all, 3 gates"
    assert (block.experts, block.form) == (4, "every expert, weighed")
    assert (names(simple.graph, "moe.experts"), names(simple.graph, "moe.combine")) == (1, 3)
    assert names(simple.graph, "moe.route") == 0  # nothing chooses
    assert names(lowered.graph, "grouped.linear") == 2
    assert declined == []


def test_experts_with_batch_norms() -> None:
    _, _, (block,), declined = run(multi_gate.Normed)
    assert (block.experts, block.form, block.router) == (
        *(4, "every expert, weighed"),
        "softmax, all, 3 gates",
    )
    assert [d for d in declined if d.rule == "recognise-experts"] == []


def test_weights_of_a_later_gate_may_be_computed_after_the_first() -> None:
    """Each task's experts have batch norms, whose scales are folded where the task runs them."""
    simple, _, (block,), declined = run(multi_gate.NormedTasks)
    assert (block.experts, block.router) == (6, "softmax, all, 2 gates")
    assert names(simple.graph, "moe.experts") == 1
    assert [d for d in declined if d.rule == "recognise-experts"] == []


@pytest.mark.parametrize("every", [False, True])
def test_shared_experts_run_once(every: bool) -> None:
    simple, lowered, (block,), declined = run(lambda: multi_gate.Customised(every))
    assert (block.experts, block.router) == (6, f"softmax, all, {2 + every} gates")
    assert names(simple.graph, "moe.experts") == 1
    assert [op.attrs["k"] for op in simple.graph.ops if op.name == "moe.combine"] == (
        [4, 4, 6] if every else [4, 4]
    )
    assert names(lowered.graph, "moe.sort") == 1
    assert declined == []


def test_text(golden: Any) -> None:
    simple, *_ = run(multi_gate.Customised)
    text = print_graph(simple.graph)
    assert print_graph(parse(text)) == text
    golden(text)


@pytest.mark.parametrize("form", [others.SoftMixture, others.SoftLoop])
def test_one_gate(form: Form) -> None:
    simple, _, (block,), declined = run(form)
    assert (block.router, block.form) == ("softmax, all", "every expert, weighed")
    assert names(simple.graph, "moe.combine") == 1
    assert declined == []


def test_experts_apart_stay_apart() -> None:
    """Two mixtures of experts of their own."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(multi_gate.MultiGate() for _ in range(2))

        def forward(self, x: torch.Tensor) -> Any:
            return sum((part(x)[:2] for part in self.parts), ())

    simple, _, described, _ = run(Apart)
    assert [block.router for block in described] == ["softmax, all, 2 gates"] * 2
    assert names(simple.graph, "moe.experts") == 2


REFUSED: dict[Form, str] = {
    multi_gate.Rectified: "every expert, weighed: the numbers differ by",
    multi_gate.Centred: "aten.sub.Tensor joins rows with mean (aten.mean.dim reduces over rows",
    multi_gate.OtherRows: "its experts differ in more than their weights",
    multi_gate.OfTokens: "the rows are never combined into tokens",
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form: Form) -> None:
    _, _, described, declined = run(form)
    assert described == ()
    assert any(REFUSED[form] in d.reason for d in declined), declined


def test_machine_code() -> None:
    module = multi_gate.Customised().eval()
    compiled = moec.compile(module, (torch.randn(6, D),), verify=False)
    for count in (0, 1, 5, 33):
        x = torch.randn(count, D)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
