"""Modules that cannot be traced are captured as what they were observed to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec
from moec.interpret.evaluate import evaluate
from tests.capture.behaviour.modules import WIDTH, CountsInNumpy, TableOfTokens

SIZES = ((2, 12), (1, 1), (3, 29), (1, 5))


def assert_equal(compiled: moec.CompiledModel, module: nn.Module) -> None:
    """The last graph gives eager's numbers at several sizes: sums of at most three results of
    float32 experts, in any order."""
    program = compiled.steps[-1].program
    for size in SIZES:
        x = torch.randn(*size, WIDTH)
        with torch.no_grad():
            expected = module(x)
        (result,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [CountsInNumpy])
def test_a_loop_over_counts_becomes_a_block(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    compiled = moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    (block,) = compiled.blocks
    assert (block.experts, block.top_k) == (4, 2)
    assert block.router == "softmax, top-2, renormalised"
    assert_equal(compiled, module)
    assert "forward" not in vars(module)


def test_the_report_says_how_and_on_what_it_was_proved() -> None:
    module = CountsInNumpy().eval()
    compiled = moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    text = " ".join(str(compiled.report()).split())
    assert "a CountsInNumpy (modules.py:" in text
    assert "was described by behaviour: experts=(experts.0, ..., experts.3)" in text
    assert "routing=(score=softmax, top_k=2, renormalise=True)" in text
    assert "runs beside eager, tokens scaled by 0.01 to 1000, up to 4097 tokens" in text


def test_what_traces_and_is_not_recognised_is_observed() -> None:
    torch.manual_seed(0)
    module = TableOfTokens().eval()
    compiled = moec.compile(module, (torch.randn(2, 12, WIDTH),), build=False)
    (block,) = compiled.blocks
    assert (block.experts, block.top_k) == (4, 1)
    assert "capacity=(least=6)" in compiled.captured.notes[0]
    assert_equal(compiled, module)
