"""Assumptions that are false, or cannot be proved, are refused with the user's line."""

from __future__ import annotations

import pytest
import torch

from moec.capture import capture
from moec.capture.speculate.proof import run_program
from moec.errors import CaptureError
from moec.ir.graph import Program
from moec.ir.text import parse
from tests.capture.speculate.layer import D, Layer
from tests.capture.speculate.lies import LIES

WORDS = {
    "adds without rows": ("`if counts[i] == 0:` was taken to be False", "eager differs by"),
    "adds without rows for the last": ("`if count == 0:` was taken to be False", "eager differs"),
    "chooses by a count": ("`if n > 7:` was taken to be True", "eager differs by"),
    "binds beyond 700 rows": ("`if rows.shape[0] > 700:` was taken to be", "eager differs by"),
    "binds beyond what is tried": ("seen to go one way only", "`if len(rows) > 100_000:`"),
    "noise that matters": ("randn_like(flat) * 0.5", "draws random numbers, taken to change no"),
    "noise that breaks ties": ("1e-9 * torch.rand_like(logits)", "draws random numbers"),
    "dropout that stays": ("depends on random numbers", "F.dropout(", "make the numbers an input"),
    "divides by the greatest count": (".max().item())` reads data into Python", "eager differs"),
    "counts the experts that were hit": ("len(ids.unique())", "reads data into Python"),
    "loops over rows": ("for token in torch.where", "as many as the data say, cannot be unrolled"),
    "loops until it converges": ("`while error > 1e-4:`", "how often this loop runs depends on"),
    "an answer outside of an if": ("`empty = not (ids == 0).any()` was taken", "eager differs by"),
    "always one way": ("seen to go one way only", ">= 0).any():` was taken to be True"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(CaptureError) as raised:
        capture(Layer(LIES[name]).eval(), (torch.randn(2, 6, D),))
    message = str(raised.value)
    assert "lies.py:" in message
    for words in WORDS[name]:
        assert words in message
    assert len(message.splitlines()) <= 6


def test_a_program_is_also_compared_beyond_its_bounds() -> None:
    """An export at S > 8 may compute the same below; its answers are then read there too."""
    text = "graph main(x: f32[S]) {\n size S in [9, inf]\n y: f32[S] = aten.relu.default(x)\n"
    program = Program(parse(f"{text} return y\n}}"), {})
    (result,) = run_program(program, [torch.ones(6)])
    assert torch.equal(result, torch.ones(6))
