"""QMoE: ternary experts of a Switch transformer; codewords are exact, and products decode them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import moec
from docs.systems import COMPARABLE, Figure, Source
from moec.ir.formats.ternary import decode, encode
from moec.ir.interpret.evaluate import evaluate
from tests.systems.records import Keep, load, record_of

example = load("19_qmoe")
SOURCE = Source(
    number=19,
    title="QMoE",
    paper="2310.16795",
    example="19_qmoe",
    process="autoregressive",
    modalities=("text",),
    adds="`compress-experts` solves experts on what the router sends them (GPTQ, then descent) and "
    "stores them as codewords; kernels decode them as they multiply.",
    trained="a copying task",
)
TOLERANCE = 1e-4  # float32, and the same weights: those that the codes stand for


@functools.cache
def compiled() -> tuple[torch.nn.Module, moec.CompiledModel]:
    torch.manual_seed(0)
    model = example.SwitchTransformer(example.SMALL)
    example.train(model, example.SMALL, steps=5)
    return model.eval(), example.compress(model, example.SMALL)


@settings(max_examples=30)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 70)),
                     elements=st.integers(0, 2)))  # fmt: skip
def test_any_ternary_matrix_is_decoded_exactly(codes: np.ndarray) -> None:
    matrix = torch.from_numpy(codes)
    assert torch.equal(decode(encode(matrix), *matrix.shape), matrix)


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)])
def test_independent_weights_are_twenty_times_smaller(shape: tuple[int, int]) -> None:
    codes = example.independent(*shape)
    assert float((codes == 0).float().mean()) == pytest.approx(example.ZEROS, abs=2e-3)
    assert example.times_smaller(codes) >= 20


def test_every_switch_is_recognised_and_compressed() -> None:
    _, ours = compiled()
    assert [(b.name, b.experts, b.router) for b in ours.blocks] == [
        ("encoder.layers.1.mlp", 4, "softmax, top-1"),
        ("decoder.layers.1.mlp", 4, "softmax, top-1"),
    ]
    products = [
        op for op in ours.pass_results[-1].program.graph.ops if op.name == "grouped.compressed"
    ]
    assert len(products) == 4
    (damage,) = ours.report().damage
    assert all("bits a weight" in line.says for line in damage.layers)


def test_decoding_products_equal_those_of_dense_ternary_weights() -> None:
    """The graph with `moe.decompress` as ops of their own multiplies by the weights in full."""
    _, ours = compiled()
    dense = next(p for p in ours.pass_results if p.name == "compress-experts").program
    inputs = example.batch(example.SMALL, 5, example.LENGTH, seed=5)
    ids = (inputs["input_ids"], inputs["decoder_ids"])
    assert [op for op in dense.graph.ops if op.name == "moe.decompress"]
    (right,) = evaluate(dense.graph, list(ids), dense.weights)
    torch.testing.assert_close(ours(*ids), right, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    size, gigabytes = example.PUBLISHED[name]
    assert 2 * example.parameters(size)[0] / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_the_count_is_that_of_the_whole_model() -> None:
    size = example.Size(layers=2, width=8, heads=2, head=4, hidden=16, experts=3, words=9)
    model = example.SwitchTransformer(size)
    total, experts = example.parameters(size)
    assert total == sum(p.numel() for p in model.parameters())
    assert experts == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)


def test_record(keep: Keep) -> None:
    figures = [
        Figure(
            f"bf16 of {name}",
            f"{2 * example.parameters(size)[0] / 1e9:,.1f} GB",
            f"{paper:,} GB",
            COMPARABLE,
        )
        for name, (size, paper) in example.PUBLISHED.items()
    ]
    figures += [
        Figure(
            f"i.i.d. {rows} x {width}, times smaller than bf16",
            f"{example.times_smaller(example.independent(rows, width)):.2f}",
            "21.11, limit 25.40",
            "other row starts",
        )
        for rows, width in example.SHAPES[:2]
    ]
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
