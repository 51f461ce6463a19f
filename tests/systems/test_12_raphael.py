"""RAPHAEL: time- and space-MoE are recognised, their routers are hoisted out of blocks and the step
loop, and sampled latents equal eager's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from docs.systems import COMPARABLE, NO_FIGURE, Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("12_raphael")
SOURCE = Source(
    number=12,
    title="RAPHAEL",
    paper="2305.18295",
    example="12_raphael",
    process="diffusion",
    modalities=("text", "image"),
    adds="A word's region and a timestep's picture are groups of rows that share a choice. Routers "
    "read the prompt or the time alone: each kind is a function of its own, asked once a prompt or "
    "once a step while the rest samples.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-4  # float32, ten layers deep
SIZES = example.Sizes(
    side=4, widths=(8,), heads=2, tokens=3, text=6, time_experts=3, space_experts=3, steps=20
)
DEPTH = 2 * len(SIZES.widths)


@functools.cache
def compiled() -> tuple[Any, CompiledModel]:
    torch.manual_seed(1)
    model = example.UNet(SIZES).eval()
    # Choices that differ from time to time and from word to word.
    blocks = [*model.down, *model.up]
    gates = [gate for b in blocks for gate in (b.time_moe.gate, b.space_moe.gate)]
    for linear in (layer for part in (model.time, *gates) for layer in (part[0], part[2])):
        torch.nn.init.normal_(linear.weight)
    return model, example.compiled(model, SIZES)


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    x = torch.randn(count, SIZES.channels, SIZES.side, SIZES.side)
    return x, torch.randn(count, SIZES.tokens, SIZES.text)


def test_every_layer_is_recognised() -> None:
    blocks = {block.name: (block.experts, block.top_k) for block in compiled()[1].blocks}
    assert blocks == {
        f"{path}.0.{kind}": (3, 1) for path in ("down", "up") for kind in ("time_moe", "space_moe")
    }


def test_routers_are_known_from_the_text_or_the_time_alone() -> None:
    _, artifact = compiled()
    says = [
        line
        for step in artifact.pass_results
        for line in step.says
        if "its experts depend on" in line
    ]
    assert sorted(line.split(" depend on ")[1] for line in says) == (
        ["t only"] * DEPTH + ["text only"] * DEPTH
    )
    _, text = inputs(2)
    assert set(artifact.routers(text=text)) == {"down.0.space_moe", "up.0.space_moe"}
    # The sum over experts and the block's residual are one op, which has the name of the block.
    assert set(artifact.routers(t=torch.tensor([1, 2]))) == {"down.0", "up.0"}
    routed = artifact.programs["routed"].graph
    assert not any(op.name in ("moe.gate", "moe.route") for op in routed.ops)


@pytest.mark.parametrize("steps", [1, 4])
def test_sampled_latents_are_eagers(steps: int) -> None:
    """Text gates: one a block, whatever the steps; eager evaluates steps times as many."""
    model, artifact = compiled()
    x, text = inputs(2)
    schedule = example.Schedule.linear(SIZES.steps)
    with torch.no_grad():
        expected = example.sample(model, x, text, schedule, steps)
    latents, calls = example.sample_hoisted(artifact, x, text, schedule, steps)
    torch.testing.assert_close(latents, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (calls.text, calls.time) == (DEPTH, steps * DEPTH)


def test_times_and_words_choose_different_experts() -> None:
    """So that a choice which is used for another time or word shows in the latents."""
    _, artifact = compiled()
    _, text = inputs(2)
    by_time = [artifact.routers(t=torch.full((2,), t)) for t in (0, 6, 13, 19)]
    by_text = artifact.routers(text=text)
    for name in by_time[0]:
        assert len({int(step[name]["experts"][0]) for step in by_time}) > 1
    for choice in by_text.values():
        assert len(choice["experts"].unique()) > 1


def test_another_prompt_is_another_picture() -> None:
    """The choices of one prompt are not used for another."""
    _, artifact = compiled()
    x, text = inputs(2)
    schedule = example.Schedule.linear(SIZES.steps)
    first, _ = example.sample_hoisted(artifact, x, text, schedule, 2)
    other, _ = example.sample_hoisted(artifact, x, -text, schedule, 2)
    assert float((first - other).abs().max()) > 1e-3


def test_it_learns() -> None:
    torch.manual_seed(0)
    losses = example.train(example.UNet(SIZES), SIZES, example.Schedule.linear(SIZES.steps), 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_record(keep: Keep) -> None:
    steps = 10
    gates = f"{DEPTH}, eager {steps * DEPTH}"
    figures = [
        Figure("gates of the text in 10 steps", gates, "not told", NO_FIGURE),
        Figure("spatial paths", f"{6**16:,} with 16 blocks", "6^16", COMPARABLE),
    ]
    missing = (
        "F.interpolate: aten.upsample_nearest2d has no kernel; the example doubles pixels with "
        "repeat_interleave, which is the same",
    )
    keep(record_of(compiled()[1], SOURCE, "0.0001", figures, missing))
