"""Bounds on weights, probability masses, padding in the routing, external choices: each is one
block. Its router stays the module's own code, and the report has the reason."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.interpret.evaluate import evaluate
from moec.oracle.tolerance import distance
from tests.capture.behaviour import routings

OUTSIDE = "router: custom: its choices are not computed from logits [.., E]"
LINEAR = "forms of routing were tried from linear; the last one: "


@pytest.mark.parametrize(
    ("kind", "top_k", "why"),
    [
        (routings.WeightsOverABound, 2, LINEAR + "weights or choices differ"),
        (routings.Mass, 4, LINEAR + "it chooses ids that are not experts"),
        (routings.MassWithoutRenormalising, 4, "aten.constant_pad_nd.default is between"),
        (routings.PaddingInTheWeights, 2, "router: custom: it also reads more_0"),
        (routings.PaddingInTheChoice, 2, "router: custom: it also reads more_0"),
        (routings.PaddingInTheLogits, 2, "the logits come from aten.mul.Tensor, not from a lin"),
        (routings.ChosenOutside, 1, OUTSIDE),
        (routings.OneHotOutside, 1, "router: custom: it also reads more_0"),
        (routings.ChosenOutsideWithWeights, 2, OUTSIDE),
        (routings.WeighedTableOutside, 2, OUTSIDE),
    ],
)
def test_a_block_whose_router_is_the_modules(
    kind: type[routings.Routing], top_k: int, why: str
) -> None:
    torch.manual_seed(0)
    module = kind().eval()
    result = moec.compile(module, module.inputs(3, 12), build=False)
    assert [(block.experts, block.top_k) for block in result.blocks] == [(4, top_k)]
    (reason,) = [declined.reason for declined in result.declined]
    assert why in reason
    program = result.pass_results[-1].program
    for size in ((1, 1), (3, 29)):
        inputs = module.inputs(*size)
        (actual,) = evaluate(program.graph, inputs, program.weights)
        with torch.no_grad():
            assert distance(actual, module(*inputs)) < 1e-5


def test_a_threshold_without_a_choice_is_declined() -> None:
    module = routings.ScoresOverABound().eval()
    result = moec.compile(module, module.inputs(3, 12), build=False)
    assert not result.blocks
    (declined,) = result.declined
    assert declined.reason == "every token uses all 4 experts: no op chooses among them"
