"""average-experts: one dense layer for all experts, exact if they are equal."""

from __future__ import annotations

import pytest
import torch

from moec.errors import UsageError
from moec.ir.text import print_graph
from moec.passes.approximate.average_experts import AverageExperts, mean
from moec.passes.approximate.prune_experts import PruneExperts
from tests.passes.changed import LAYER, LIMITED, SCALED, change, declined, outputs, program, tokens

TOP_1 = (
    LAYER.replace("k=2, renormalize=true", "k=1")
    .replace("f32[B*S, 2], i#: i64[B*S, 2]", "f32[B*S, 1], i#: i64[B*S, 1]")
    .replace("f32[2*B*S", "f32[B*S")
    .replace("i32[2*B*S]", "i32[B*S]")
    .replace("k=2, tokens", "k=1, tokens")
)
SCALED_INPUT = (
    TOP_1.replace("moe.dispatch(IN, i#)", "moe.dispatch(IN, i#, w#)")
    .replace("(out#, order#, w#)", "(out#, order#)")
    .replace(", weighted=true", "")
)
FORMS = {
    "renormalised": LAYER,
    "scaled": LAYER.replace("renormalize=true", "renormalize=true, scale=2.5"),
    "not renormalised": LAYER.replace(", renormalize=true", ""),
    "softmax of the chosen": LAYER.replace("renormalize=true", 'score="none", after="softmax"'),
    "sigmoid": LAYER.replace("renormalize=true", 'score="sigmoid"'),
    "not weighted": LAYER.replace("(out#, order#, w#)", "(out#, order#)").replace(
        ", weighted=true", ""
    ),
    "top-1": TOP_1,
    "weights on the input": SCALED_INPUT,
}


def test_text(golden):
    golden(print_graph(change(program(1), AverageExperts())[-1].program.graph))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["uniform", "usage"])
def test_equal_experts_become_one_without_damage(form, by):
    """Only the order of sums changes, and the weights' own sum is taken to be one."""
    original = program(2, FORMS[form])
    for name, tensor in original.weights.items():
        if ".w" in name:
            tensor[:] = tensor[0].clone()
    step = change(original, AverageExperts(by=by))[-1]
    assert step.damage.after.error < 1e-6
    assert not any(op.name == "moe.experts" for op in step.program.graph.ops)
    for seed in range(3):
        ids = tokens(48, seed)
        torch.testing.assert_close(
            outputs(step.program, ids), outputs(original, ids), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("form", "remaining"), [("renormalised", False), ("not renormalised", True)]
)
def test_a_router_whose_weights_sum_to_one_goes_away(form, remaining):
    text = print_graph(change(program(1, FORMS[form]), AverageExperts())[-1].program.graph)
    assert ("moe.route" in text) == ("layers.0.router" in text) == remaining


def test_the_mean():
    stack = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    assert mean(stack, torch.tensor([0.5, 0.5])).tolist() == [3, 3]
    assert mean(stack, torch.tensor([0.25, 0.75])).tolist() == [4, 3.5]
    assert mean(stack.bfloat16(), torch.tensor([0.5, 0.5])).dtype == torch.bfloat16


def test_weights_are_the_mean_and_bytes_are_saved():
    original = program(1)
    step = change(original, AverageExperts())[-1]
    result = step.program.weights
    for name in ("w1", "w2", "w3"):
        expected = original.weights[f"layers.0.{name}"].mean(0)
        torch.testing.assert_close(result[f"layers.0.{name}_2"], expected)
    (line,) = step.damage.layers
    assert line.says == "4 experts become one, weighted by uniform"
    assert line.bytes_saved == 4 * (3 * 3 * 48 + 4 * 8)  # three experts, and the router
    assert line.flops_saved == 2 * (3 * 48 + 4 * 8)  # one choice of two, and the router
    assert line.changed == step.damage.after.changed == 1


def test_usage_weighs_the_mean():
    original = program(1)
    original.weights["layers.0.router"][3] = 0
    original.weights["embed"][:, 0] = 9.0
    original.weights["layers.0.router"][:, 0] = torch.tensor([2.0, 1.0, -3.0, -3.0])
    step = change(original, AverageExperts(by="usage"))[-1]  # everyone chooses 0 and 1
    expected = original.weights["layers.0.w1"][:2].mean(0)
    torch.testing.assert_close(step.program.weights["layers.0.w1_2"], expected)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            LIMITED,
            "drops choices beyond a capacity",
        ),
        (
            SCALED,
            "each of 2 choices scales its own input",
        ),
        (
            LAYER.replace("(out#, order#, w#)", "(out#, order#, w#, IN)").replace(
                "weighted=true", "weighted=true, added=true"
            ),
            "another branch is added inside moe.combine",
        ),
    ],
    ids=["capacity", "scaled inputs", "added"],
)
def test_declines(layer, says):
    assert says in declined(program(1, layer), AverageExperts())


def test_whole_numbers_have_no_mean():
    layer = (
        LAYER.replace("layers.#.w2)", "f2#)")
        .replace("b2: f32[8, 6]", "q2: i8[8, 6]")
        .replace(
            "      y: f32[R, 8] = aten.linear.default(h, b2)",
            "      b2: f32[8, 6] = aten._to_copy.default(q2) <dtype=f32>\n"
            "      y: f32[R, 8] = aten.linear.default(h, b2)",
        )
        .replace(
            "  rows#:",
            "  f2#: i8[4, 8, 6] = aten._to_copy.default(layers.#.w2) <dtype=i8>\n  rows#:",
        )
    )
    assert "are torch.int8, whose mean is not defined" in declined(
        program(1, layer), AverageExperts()
    )


def test_options_are_refused():
    with pytest.raises(UsageError, match="by is 'reap', expected one of uniform, usage"):
        AverageExperts(by="reap")


def test_a_pruned_layer_can_be_averaged():
    step = change(program(2), PruneExperts(keep=0.5), AverageExperts())[-1]
    assert not any(op.name.startswith("moe.") for op in step.program.graph.ops)
    assert step.damage.after.changed == 1
