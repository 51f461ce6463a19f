"""Modules that almost are what they are described to be are refused, with the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.capture.behaviour.hints import as_hints, describe_by_hints
from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.proof.proof import Proof
from moec.errors import NoMatch
from tests.capture.behaviour import look_alikes as seeming
from tests.capture.behaviour.modules import HINTS, WIDTH


def described(kind: type[seeming.LookAlike], **more: Any) -> Proof:
    torch.manual_seed(0)
    tokens = Arguments.of((torch.randn(2, 12, WIDTH),), {})
    return describe_by_hints(kind().eval(), tokens, as_hints(**(HINTS | more)))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (seeming.LookAlike, {}),
        (seeming.Threshold, {"threshold_on": "weight", "threshold": 0.02}),
        (seeming.LateCapacity, {"capacity": {"least": 700}}),
    ],
)
def test_right_descriptions_are_proved(kind: type[seeming.LookAlike], more: dict[str, Any]) -> None:
    assert "score=softmax, top_k=2, renormalise=True" in str(described(kind, **more).description)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (seeming.RareThreshold, "output differs on"),
        (seeming.ClampedLogits, "output differs on 2 x 12 tokens, tokens times 20: row"),
        (seeming.RoundedWeights, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.WeightsInBfloat16, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.CapacityOfOneExpert, "output differs on 1 x"),
        (seeming.ClampedOutput, "tokens times 1000: row"),
        (seeming.Noise, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.Growing, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.WrongBeyond, "output differs on 1 x 200 tokens"),
        (seeming.WrongFarBeyond, "output differs on 1 x 1000 tokens"),
        (seeming.HalfOfSomeLengths, "output differs on 1 x 101 tokens, a number of its code"),
        (seeming.HalfOfManyElements, "output differs on 1 x 4501 tokens, a number of its code"),
        (seeming.HalfFarBeyond, "output differs on 1 x 32768 tokens, the most tokens"),
        (seeming.OneTokenAlone, "output differs on 1 x 1 tokens"),
        (seeming.TokensMeet, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.TokensMeetInTheRouter, "output differs on 2 x 12 tokens, tokens times 1: row"),
        (seeming.OtherExpert, "output differs on 2 x 12 tokens"),
    ],
)
def test_refused(kind: type[seeming.LookAlike], words: str) -> None:
    with pytest.raises(NoMatch) as raised:
        described(kind)
    assert words in str(raised.value)


def test_what_lies_below_the_tolerance_is_said_to() -> None:
    text = str(described(seeming.TinyThreshold))
    assert "agree to 2e-05 of the greatest value; more tokens are refused" in text
