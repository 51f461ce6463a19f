"""Families without special code are recognised, and equal eager after every pass."""

from __future__ import annotations

import pytest
import torch

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import distance
from moec.verify.cases import references
from tests.models.other_families import OTHER_FAMILIES

# One of each kind: groups, MLA, biases of two shapes, norms of all heads at once, shared
# experts, windows, convolutions, norms after experts, own loops, text parts of larger models,
# and each kind of linear attention.
TRIED = (
    "glm4_moe",
    "glm4_moe_lite",
    "granitemoeshared",
    "gemma4",
    "mimo_v2_flash",
    "cohere2_moe",
    "muse_spark",
    "aria_text",
    "qwen3_vl_moe",
    "kimi_linear",
    "nemotron_h",
    "minimax",
    "longcat_flash",
)
COMPILED = (
    "minimax_m2",
    "lfm2_moe",
    "ernie4_5_moe",
    "qwen3_next",
    "granitemoehybrid",
    "jamba",
    "deepseek_v32",
)
CUSTOM = {
    "gemma4": "weights or choices differ",  # each expert has a factor of its own
}
"""Routers that stay as they are, and why."""
TOLERANCE = 1e-5  # sums are reordered in float32, over two layers


@pytest.mark.parametrize("name", TRIED)
def test_is_recognised_and_equals_eager(name: str) -> None:
    family = OTHER_FAMILIES[name]
    compiled = moec.compile(family.build(), (), family.inputs(2, 7), build=False)
    assert compiled.blocks
    routers = [block.router for block in compiled.blocks]
    reasons = [d.reason for d in compiled.declined if d.rule == "recognise-routers"]
    assert [r for r in routers if r == "custom"] == ["custom"] * len(reasons)
    assert all(name in CUSTOM and CUSTOM[name] in reason for reason in reasons)
    program = compiled.pass_results[-1].program
    more = tuple(torch.randint(3, 160, (2, 40)) for _ in compiled.captured.example)
    answers, _ = references(compiled.captured)
    for case in [*(case for case, _ in answers), more]:
        actual = evaluate(program.graph, case, program.weights)
        for ours, theirs in zip(actual, compiled.captured.eager(*case), strict=True):
            assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name: str) -> None:
    family = OTHER_FAMILIES[name]
    compiled = moec.compile(family.build(), (), family.inputs(2, 7), verify=TOLERANCE)
    assert compiled.checked is not None
    assert compiled.blocks
    assert all(block.router != "custom" for block in compiled.blocks)
