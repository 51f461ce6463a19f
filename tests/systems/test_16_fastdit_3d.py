"""FastDiT-3D: one artifact serves 1 % to 100 % of the patches, and sampling equals eager's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from docs.systems import Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("16_fastdit_3d")
SOURCE = Source(
    number=16,
    title="FastDiT-3D",
    paper="2312.07231",
    example="16_fastdit_3d",
    process="diffusion",
    modalities=("voxels",),
    adds="The encoder's experts are sorted rows of the kept patches alone; their number is a named "
    "size, so that extreme masking and sampling are one artifact. Counts of experts are ours: the "
    "paper's were not found.",
    trained="generated shapes",
)
TOLERANCE = 1e-4  # float32, attention over up to 64 patches, three layers
SIZES = example.Sizes(side=8, patch=2, window=2, width=16, heads=2, encoder=1, experts=3, steps=20)


@functools.cache
def compiled() -> tuple[Any, CompiledModel]:
    torch.manual_seed(0)
    model = example.FastDiT3D(SIZES).eval()
    return model, example.compiled(model)


def test_recognised() -> None:
    (block,) = compiled()[1].blocks
    assert (block.experts, block.top_k, block.router) == (3, 2, "softmax, top-2")


@pytest.mark.parametrize("share", [0.01, 0.05, 1.0])
def test_any_share_of_the_patches(share: float) -> None:
    model, artifact = compiled()
    inputs = example.example(SIZES, 2, max(1, round(share * SIZES.patches)))
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(artifact(*inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_sampling_is_eagers() -> None:
    model, artifact = compiled()
    start, label = torch.randn(2, *(SIZES.side,) * 3), torch.tensor([0, 2])
    with torch.no_grad():
        expected = example.sample(model, start, label, SIZES, 3)
    voxels = example.sample(artifact, start, label, SIZES, 3)
    torch.testing.assert_close(voxels, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_is_masked_is_not_seen() -> None:
    """The encoder reads the kept patches alone."""
    _, artifact = compiled()
    voxels, t, label, keep = example.example(SIZES, 1, 5)
    patches = example.to_patches(voxels, SIZES)
    hidden = torch.ones(SIZES.patches, dtype=torch.bool).index_fill(0, keep[0], False)
    patches[:, hidden] = 7.0
    other = example.to_voxels(patches, SIZES)
    first, second = (artifact(x, t, label, keep) for x in (voxels, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_foreground_and_background_are_masked_apart() -> None:
    voxels, _ = example.shapes(4, SIZES)
    full = example.to_patches(voxels, SIZES).amax(-1) > 0
    keep = example.draw_patches(voxels, SIZES, 0.9, 0.05)
    among = full.gather(1, keep).float().mean()
    assert among > 2 * full.float().mean()


def test_it_learns() -> None:
    torch.manual_seed(0)
    losses = example.train(example.FastDiT3D(SIZES), 40, 0.9, 0.3)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_record(keep: Keep) -> None:
    cost = example.work(example.PUBLISHED, 0.01) / example.work(example.PUBLISHED, 1.0)
    ours = f"{cost:.2%} of the encoder's multiplications, counted"
    figures = [
        Figure(
            "cost of 1 % of the patches",
            ours,
            "6.5 % of the cost of training",
            "multiplications of the encoder only",
        )
    ]
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
