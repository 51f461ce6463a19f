"""MJ-VIDEO: the mixture on two levels is one node with one softmax over all aspects; the end of the
prompt is an input; scores and rankings of pairs equal eager's."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from docs.systems import Figure, Source
from tests.systems.records import Keep, load, record_of

example = load("17_mj_video")
SOURCE = Source(
    number=17,
    title="MJ-VIDEO",
    paper="2502.01719",
    example="17_mj_video",
    process="encoder",
    modalities=("video", "text"),
    adds="The mixture on two levels is one node, whose five small softmaxes are one. Where the "
    "prompt ends is an input, found by Python. Both videos of all pairs are scored by one call.",
    trained="generated videos",
)
TOLERANCE = 1e-4  # float32 sums in another order


@functools.cache
def compiled() -> tuple[torch.nn.Module, moec.CompiledModel]:
    torch.manual_seed(0)
    model = example.RewardModel(example.SMALL).eval()
    return model, example.serve(model, example.SMALL)


def test_two_levels_are_one_node_with_one_softmax() -> None:
    """One softmax of the aspects, and one of the criteria of all aspects."""
    (block,) = compiled()[1].blocks
    assert (block.name, block.experts, block.top_k) == ("mixture", 28, 28)
    assert block.router == "softmax within 5 groups, each weighed"
    by_name = {step.name: step.program.graph for step in compiled()[1].pass_results}
    (node,) = [op for op in by_name["recognise-hierarchies"].ops if op.name == "moe.hierarchy"]
    assert node.attrs["groups"] == tuple(map(len, example.ASPECTS.values()))
    softmaxes = [
        op
        for op in compiled()[1].graph.ops
        if "softmax" in op.name and op.origin.startswith("mixture")
    ]
    assert len(softmaxes) == 2


def test_scores_weights_and_rewards_equal_eager() -> None:
    model, ours = compiled()
    for count in (1, 5):
        bright, _, tokens = example.videos(example.SMALL, count, seed=count)
        inputs = (bright, tokens, *example.positions(tokens))
        with torch.no_grad():
            for actual, eager in zip(ours(*inputs), model(*inputs), strict=True):
                torch.testing.assert_close(actual, eager, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_score_is_the_mixture_of_both_levels() -> None:
    """Each criterion's weight is the product of two softmax values, written out here."""
    torch.manual_seed(0)
    mixture = example.Mixture(example.SMALL)
    last, prompt = torch.randn(4, 32), torch.randn(4, 32)
    with torch.no_grad():
        mixture.aspect_scale.fill_(1.5)
        mixture.criterion_scale.fill_(0.5)
        score, weights, rewards = mixture(last, prompt)
        aspects = 1.5 * mixture.aspect_gate(prompt).softmax(-1)
        gates = mixture.criterion_gate(prompt)
    torch.testing.assert_close(weights, aspects)
    total = torch.zeros(4)
    for aspect, members in enumerate(example.ASPECTS.values()):
        exponentials = gates[:, list(members)].exp()
        shares = 0.5 * exponentials / exponentials.sum(-1, keepdim=True)
        total += aspects[:, aspect] * (shares * rewards[:, list(members)]).sum(-1)
    torch.testing.assert_close(score, total)
    assert sorted(c for members in example.ASPECTS.values() for c in members) == list(range(28))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8))
def test_positions_are_those_of_the_last_answer_and_token(
    before: list[int], after: list[int]
) -> None:
    text = [*before, *example.ANSWER, *after]
    last, prompt = example.positions(torch.tensor([text]))
    start = int(prompt)
    assert tuple(text[start : start + 5]) == example.ANSWER
    assert all(tuple(text[i : i + 5]) != example.ANSWER for i in range(start + 1, len(text)))
    assert text[int(last)] != 0
    assert not any(text[int(last) + 1 :])


def test_a_text_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold the tokens that begin the answer"):
        example.positions(torch.tensor([[1, 2, 3, 4, 5, 6]]))


def test_pairs_are_ranked_by_one_call_as_eager_ranks_them() -> None:
    model, ours = compiled()
    calls: list[int] = []

    def counted(videos: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(len(videos))
        return ours(videos, *rest)

    bright, dark, tokens = example.videos(example.SMALL, 6, seed=3)
    first, second = example.rank(counted, (bright, dark), tokens)
    with torch.no_grad():
        eager = example.rank(model, (bright, dark), tokens)
    assert calls == [12]
    torch.testing.assert_close(first - second, eager[0] - eager[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_it_learns_to_prefer_the_better_video() -> None:
    torch.manual_seed(0)
    model = example.RewardModel(example.SMALL)
    curves = example.train(model, example.SMALL, steps=40)
    assert sum(curves[0][-5:]) / 5 < 0.5 * curves[0][0]  # the criteria
    assert sum(curves[2][-5:]) / 5 < curves[2][0]  # the overall score
    assert example.accuracy(model.eval(), example.SMALL) > 0.8


def test_record(keep: Keep) -> None:
    count = example.parameters(example.INTERNVL2_2B) / 1e9
    quantity = "parameters of InternVL2-2B with the gates"
    figures = (Figure(quantity, f"{count:.2f} B", "2 B", "a name of one digit"),)
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
