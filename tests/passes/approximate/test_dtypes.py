"""Approximate passes on a layer in float64, which is compiled in the form of its behaviour: the
traced form has an op without kernels for that dtype."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.ir.interpret.evaluate import evaluate
from tests.capture.modules import WIDTH, Moe


@pytest.mark.parametrize(
    ("passes", "exact"),
    [
        ("+insert-zero-experts", True),
        ("+insert-zero-experts(way=calibrated,by=copy)", False),
        ("+average-experts", False),
        ("+keep-used", True),
    ],
)
def test_a_layer_in_float64(passes: str, exact: bool) -> None:
    """The router's kernel computes in float32, so that an unchanged layer is 1e-6 off."""
    model, x = Moe(torch.float64).eval(), torch.randn(80, WIDTH, dtype=torch.float64)
    compiled = moec.compile(model, (x,), passes=passes, calib={"x": x}, build=False)
    program = compiled.pass_results[-1].program
    assert [value.name for value in program.graph.inputs] == ["x"]
    (result,) = evaluate(program.graph, [x], program.weights)
    with torch.no_grad():
        error = float((result - model(x)).abs().max())
    assert (error < 1e-6) == exact
    (damage,) = compiled.report().damage
    assert (damage.after.error < 1e-6) == exact
