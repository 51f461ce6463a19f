"""OneRec: a decoder of 24 experts compiles for any number of beams, whose rows share one dispatch;
beam search generates eager's codes."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

import moec
from docs.systems import Figure, Source
from moec import CompiledModel
from moec.ir.sizes.dims import symbols
from tests.systems.records import Keep, load, record_of

example = load("05_onerec")
SOURCE = Source(
    number=5,
    title="OneRec",
    paper="2502.18965",
    example="05_onerec",
    process="autoregressive",
    modalities=("recommendation",),
    adds="The decoder is one artifact for any number of beams and codes; the rows of all beams are "
    "grouped by expert in one dispatch.",
    trained="random sessions",
)
TOLERANCE = 1e-5  # float32, sums of 16 terms, one layer


@functools.cache
def compiled() -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small()
    return model, moec.compile(model, inputs, kv_cache=False, verify=False)


def test_recognised_with_the_rows_of_all_beams_in_one_dispatch() -> None:
    _, ours = compiled()
    (block,) = ours.blocks
    assert (block.experts, block.top_k, block.router) == (24, 2, "softmax, top-2")
    sorts = [op for op in ours.graph.ops if op.name == "moe.sort"]
    ((tokens, choices),) = [op.inputs[0].shape for op in sorts]
    beams, length = (str(size) for size in ours.graph.inputs[1].shape)
    assert choices == 2
    assert symbols(tokens) == {beams, length}


def test_beam_search_writes_what_eager_writes() -> None:
    """Twelve beams, two items: the batch grows from one to twelve on the way."""
    decoder, ours = compiled()
    torch.manual_seed(1)
    encoder = example.Encoder(example.SMALL).eval()
    history = torch.randint(3 * example.SMALL.codes, (1, 9))
    searches = [
        example.beam_search(encoder, decode, history, example.SMALL.codes, items=2, beams=12)
        for decode in (decoder, ours)
    ]
    (expected, scores), (codes, ours_scores) = searches
    assert codes.shape == (12, 6)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(ours_scores, scores, rtol=1e-4, atol=1e-4)
    levels = torch.arange(6) % 3
    assert torch.equal(codes // example.SMALL.codes, levels.expand(12, -1))


def test_all_beams_are_all_sessions() -> None:
    """As many beams as there are sessions leave nothing out: their log probabilities are those of
    every session by itself, the best first."""
    torch.manual_seed(2)
    decoder = example.Decoder(example.SMALL).eval()
    memory, codes = torch.randn(1, 4, example.SMALL.width), 4
    sessions, scores = example.beam_search(
        lambda _: memory, decoder, torch.zeros(1, 1), codes, items=1, beams=codes**3
    )
    every = torch.cartesian_prod(*(torch.arange(codes) + level * codes for level in range(3)))
    start = torch.full((len(every), 1), example.LEVELS * codes)
    with torch.no_grad():
        logits = decoder.scores(memory.expand(len(every), -1, -1), torch.cat((start, every), 1))
    each = [
        logits[:, level, level * codes : (level + 1) * codes]
        .log_softmax(-1)
        .gather(1, every[:, level : level + 1] - level * codes)
        for level in range(3)
    ]
    expected, order = torch.cat(each, 1).sum(1).sort(descending=True)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sessions, every[order])


def test_alignment_prefers_the_better_sessions() -> None:
    torch.manual_seed(0)
    decoder = example.Decoder(example.SMALL)
    memory = torch.randn(4, 6, example.SMALL.width)
    better, worse = (torch.randint(36, (4, 7)) for _ in range(2))
    losses = example.align(decoder, memory, better, worse, steps=10)
    assert abs(losses[0] - math.log(2)) < 1e-5  # nothing gained on the reference yet
    assert losses[-1] < 0.62


def test_the_published_size() -> None:
    assert example.published()[0] / 1e9 == pytest.approx(0.1, rel=0.01)


def test_record(keep: Keep) -> None:
    total, active = (count / 1e9 for count in example.published())
    ours = f"{total:.3f}B, {active:.3f}B active"
    figures = [Figure("parameters of 0.1B", ours, "0.1B", "widths chosen here")]
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
