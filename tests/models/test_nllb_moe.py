"""The sparse layer of nllb_moe: transformers 5.24 uses its one-hot mask as the ids of experts, and
the block does the same."""

from __future__ import annotations

import torch
from transformers import NllbMoeConfig, NllbMoeSparseMLP

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.oracle.tolerance import TOLERANCES, distance

WIDTH, EXPERTS = 16, 4


def test_the_sparse_layer_is_a_block() -> None:
    torch.manual_seed(0)
    config = NllbMoeConfig(d_model=WIDTH, num_experts=EXPERTS)
    layer = NllbMoeSparseMLP(config, 24).eval()
    compiled = moec.compile(layer, (torch.randn(2, 7, WIDTH),), build=False)
    (block,) = compiled.blocks
    assert (block.experts, block.top_k, block.activation) == (EXPERTS, EXPERTS, "relu")
    program = compiled.pass_results[-1].program
    for size in ((1, 1), (2, 7), (1, 40)):
        x = torch.randn(*size, WIDTH)
        (y,) = evaluate(program.graph, [x], program.weights)
        with torch.no_grad():
            assert distance(y, layer(x.clone())) <= TOLERANCES["f32"]
