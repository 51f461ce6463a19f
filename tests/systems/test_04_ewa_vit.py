"""EWA: the pass average-experts makes one FFN with the mean of the experts' weights; for equal
experts it equals the MoE layer; a step of weight averaging does not change the mean."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import moec
from docs.systems import Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("04_ewa_vit")
SOURCE = Source(
    number=4,
    title="Experts Weights Averaging",
    paper="2308.06093",
    example="04_ewa_vit",
    process="encoder",
    modalities=("image",),
    adds="Experts that a partition assigns are recognised as MoE with top-1 routing, and "
    "average-experts makes one FFN of them. examples/10_ewa.py trains so.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-5  # float32, sums of 64 terms


def averaged(experts: nn.Module, x: Tensor, scores: Tensor) -> CompiledModel:
    calib = {"x": torch.randn(64, x.shape[1]), "scores": example.partition(64, scores.shape[1])}
    return moec.compile(experts, (x, scores), passes="+average-experts", calib=calib, verify=False)


@functools.cache
def compiled() -> tuple[nn.Module, tuple[Tensor, ...], CompiledModel]:
    torch.manual_seed(0)
    experts, inputs = example.small()
    return experts, inputs, moec.compile(experts, inputs, verify=False)


def test_a_partition_is_top_1_routing() -> None:
    experts, inputs, ours = compiled()
    (block,) = ours.blocks
    assert (block.experts, block.top_k, block.router) == (example.SMALL.experts, 1, "top-1")
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), experts(*inputs), rtol=1e-4, atol=TOLERANCE)


def test_averaged_experts_are_one_ffn_with_their_mean() -> None:
    experts, inputs, _ = compiled()
    one = averaged(experts, *inputs)
    assert one.blocks == ()
    with torch.no_grad():
        expected = experts.mean()(inputs[0])
        torch.testing.assert_close(one(*inputs), expected, rtol=1e-4, atol=TOLERANCE)


def test_of_equal_experts_the_mean_is_the_layer() -> None:
    torch.manual_seed(1)
    ffn = example.FeedForward(example.SMALL.width, example.SMALL.hidden)
    experts, (_, inputs, _) = example.Experts(ffn, 4).eval(), compiled()
    with torch.no_grad():
        torch.testing.assert_close(experts.mean()(inputs[0]), experts(*inputs))


def test_a_step_of_averaging_leaves_the_mean() -> None:
    torch.manual_seed(2)
    experts, _ = example.small()
    before = experts.mean()
    first = experts.experts[0].up.weight.clone()
    experts.share(0.3)
    assert not torch.equal(experts.experts[0].up.weight, first)
    for new, old in zip(experts.mean().parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)  # float32 sums of four


def test_a_partition_is_even() -> None:
    assert example.partition(16, 4).sum(0).tolist() == [4.0] * 4


def test_it_learns_and_folds_into_the_plain_transformer() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = example.digits()
    start = example.VisionTransformer(example.SMALL)
    experts = example.with_experts(start, example.SMALL)
    example.train(experts, images, labels, 60, example.SMALL.share)
    model = example.folded(experts)
    assert model.state_dict().keys() == start.state_dict().keys()
    assert example.accuracy(model, test_images, test_labels) > 0.3  # 0.1 by chance


def test_record(keep: Keep) -> None:
    keep(record_of(compiled()[2], SOURCE, f"{TOLERANCE:g}"))
