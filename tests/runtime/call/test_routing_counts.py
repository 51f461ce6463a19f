"""The tokens of each expert, counted call by call, are those of a recording of the same calls."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.call.recorder import Recorder
from moec.runtime.package import RecordedLayer
from moec.serving.routing_watch import RoutingCounts

LAYERS = (RecordedLayer("first", 4), RecordedLayer("second", 7), RecordedLayer("last", 1))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], Any, int]:
    """Choices, lengths and piece of a call of `decode`. Ids may be no expert; the last layer may
    have a row for the last token of each text alone."""
    texts, piece = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    lengths = np.array(draw(st.lists(st.integers(0, piece), min_size=texts, max_size=texts)))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    wild = draw(st.booleans())
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    rows = [texts * piece, texts * piece, texts if draw(st.booleans()) else texts * piece]
    choices = [
        random.integers(-2 * wild, layer.experts + 2 * wild, (n, 2)).astype(dtype)
        for n, layer in zip(rows, LAYERS, strict=True)
    ]
    return choices, lengths, piece


@given(st.lists(calls(), min_size=1, max_size=4), st.booleans())
def test_counts_are_those_of_a_recording(sequence: list[Any], main: bool) -> None:
    recorder, counts = Recorder(LAYERS), RoutingCounts(LAYERS)
    for choices, lengths, piece in sequence:
        for observer in (recorder, counts):
            observer.add_decode(choices, lengths, piece, np.arange(len(lengths), dtype=np.int32))
            if main:
                tokens = [choices[0], choices[1], choices[0]]
                observer.add_main(tokens, np.zeros(1, np.int32))
    expected = [layer.tolist() for layer in recorder.trace().counts()]
    assert [layer.tolist() for layer in counts.counts] == expected
