"""MoE-LM: the heads of all experts are one product, candidates are decoded in one batch, and the
manager selects as in eager."""

from __future__ import annotations

import functools
from typing import Any

import torch

import moec
from docs.systems import Source
from tests.systems.records import Keep, load, record_of

example = load("18_moe_lm")
SOURCE = Source(
    number=18,
    title="MoE-LM",
    paper="2206.00059",
    example="18_moe_lm",
    process="autoregressive",
    modalities=("text",),
    adds="One encoding serves all experts, whose heads are one product (`join-linears`); one "
    "decoder serves all candidates of all conversations in a batch.",
    trained="generated conversations",
)
TOLERANCE = 1e-4  # float32 sums in another order


@functools.cache
def built() -> tuple[tuple[Any, ...], tuple[moec.CompiledModel, ...], Any]:
    torch.manual_seed(0)
    *parts, learned = example.build(example.SMALL, steps=25)
    return tuple(parts), tuple(example.compiled_parts(tuple(parts), example.SMALL)), learned


def test_heads_of_all_experts_are_one_product() -> None:
    ours = built()[1][0]
    heads = [
        op
        for op in ours.pass_results[-1].program.graph.ops
        if "linear" in op.name and op.origin.startswith("experts")
    ]
    size = example.SMALL
    (head,) = heads
    assert head.outputs[0].shape[-1] == 2 * size.experts * size.latent
    (result,) = [result for result in ours.pass_results if result.name == "join-linears"]
    assert result.says == ("10 linear layers that read one value become one",)


def test_latents_equal_eager() -> None:
    (candidates, *_), (ours, *_), _ = built()
    contexts, noise = torch.randint(32, (5, 11)), example.noise(example.SMALL, 5)
    with torch.no_grad():
        for actual, right in zip(ours(contexts, noise), candidates(contexts, noise), strict=True):
            torch.testing.assert_close(actual, right, rtol=TOLERANCE, atol=TOLERANCE)


def test_candidates_and_picks_equal_eager_with_fixed_noise() -> None:
    parts, ours, _ = built()
    contexts, _ = example.conversations(example.SMALL, 6)
    noise = example.noise(example.SMALL, 6)
    calls: list[int] = []

    def decode(latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        return ours[1](latents, tokens)

    with torch.no_grad():
        message, pick = example.converse(parts, example.SMALL, contexts, noise)
    actual, picked = example.converse((ours[0], decode, ours[2]), example.SMALL, contexts, noise)
    assert torch.equal(actual, message)
    assert torch.equal(picked, pick)
    size = example.SMALL
    assert calls == [6 * size.experts] * size.length  # all candidates in one batch


def test_the_parts_learn() -> None:
    parts, _, learned = built()
    for losses in (learned.primitive, learned.tuned, learned.manager):
        assert sum(losses[-5:]) / 5 < 0.85 * losses[0]
    torch.manual_seed(1)
    picked, mean, best = example.chosen_reward(parts, example.SMALL)
    assert mean < picked <= best


def test_record(keep: Keep) -> None:
    missing = (
        "no block: the candidates of all experts are evaluated, and one is picked when they are "
        "said; the record is that of the encoder with its heads",
    )
    keep(record_of(built()[1][0], SOURCE, f"{TOLERANCE:g}", (), missing))
