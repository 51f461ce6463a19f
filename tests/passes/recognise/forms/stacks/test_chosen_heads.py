"""Heads of attention that tokens choose: queries and outputs are two blocks over one router's
choices, and experts are dropped from both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import Op, Program
from moec.ir.interpret.evaluate import evaluate
from moec.passes.approximate.insert_zero_experts import InsertZeroExperts
from moec.passes.core.moe_layer import Layer, Splice, constant, layer_of, replace_experts
from moec.passes.specialise.static_routing import densify, restrict_experts
from tests.passes.forms import other_choices
from tests.passes.forms.sizes import D, E
from tests.passes.recognise.test_recognise import check_text, recognised


@functools.cache
def chosen_heads() -> tuple[other_choices.ChosenHeads, Program, Any]:
    module = other_choices.ChosenHeads()
    program, blocks, _ = recognised(module)
    return module, program, blocks


def experts() -> list[Op]:
    return [op for op in chosen_heads()[1].graph.ops if op.name == "moe.experts"]


def outputs() -> Layer:
    return layer_of(chosen_heads()[1].graph, experts()[1])


def test_queries_and_outputs_are_blocks_of_one_router(golden: Callable[[str], None]) -> None:
    _, program, blocks = chosen_heads()
    check_text(program, golden)
    assert [(b.experts, b.top_k, b.router) for b in blocks] == [(E, 2, "softmax, top-2")] * 2
    assert [op.name for op in program.graph.ops].count("moe.route") == 1


def test_queries_alone_are_a_block_where_outputs_are_none() -> None:
    _, (block,), declined = recognised(other_choices.AttentionExperts())
    assert (block.form, block.experts, block.top_k) == ("gathered weights", E, 2)
    assert "it also reads x" in declined[-1].reason


def test_experts_are_dropped_from_both_blocks() -> None:
    """As if the others' logits were minus infinity."""
    module, program, _ = chosen_heads()
    (companion,) = outputs().companions
    assert companion.experts is experts()[0]
    dropped = restrict_experts(program, outputs(), [3, 1])
    counts = [op.inputs[2].shape[0] for op in dropped.graph.ops if op.name == "moe.experts"]
    assert counts == [2, 2]
    hidden = torch.tensor([-torch.inf, 0, -torch.inf, 0])
    hook = module.gate.register_forward_hook(lambda gate, inputs, logits: logits + hidden)
    x = torch.randn(7, D)
    with torch.no_grad():
        expected = module(x)
    hook.remove()
    (actual,) = evaluate(dropped.graph, [x], dropped.weights)
    # Sums of at most D terms in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_changes_one_block_alone_is_refused() -> None:
    _, program, _ = chosen_heads()
    with pytest.raises(NoMatch, match="are also read by"):
        layer_of(program.graph, experts()[0])  # its results have no weights
    stacks = [constant(program, stack)[:2] for stack in outputs().stacks]
    with pytest.raises(NoMatch, match="are also read by"):
        replace_experts(Splice(program), outputs(), stacks)
    with pytest.raises(NoMatch, match="another block takes the same choices"):
        InsertZeroExperts(zero=1).change(program, outputs(), None)  # type: ignore[arg-type]


def test_results_that_stay_apart_are_not_made_dense() -> None:
    _, program, _ = chosen_heads()
    with pytest.raises(NoMatch, match="the results of a token's experts are not summed"):
        densify(program, experts()[0], [0, 1], {})
