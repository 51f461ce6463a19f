"""Modules that almost match a hypothesis are refined, or refused with the reason."""

from __future__ import annotations

import pytest
import torch

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.proof.proof import Proof
from moec.capture.behaviour.recognise import recognise
from moec.errors import NoMatch
from tests.capture.behaviour import look_alikes as seeming
from tests.capture.behaviour.modules import WIDTH


def observed(kind: type[seeming.LookAlike]) -> Proof:
    torch.manual_seed(0)
    return recognise(kind().eval(), Arguments.of((torch.randn(2, 12, WIDTH),), {}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (seeming.LookAlike, "routing=(score=softmax, top_k=2, renormalise=True)"),
        (seeming.Threshold, "threshold_on=weight, threshold=0.02)"),
        (seeming.LateCapacity, "capacity=(least=700)"),
    ],
)
def test_refined(kind: type[seeming.LookAlike], words: str) -> None:
    assert words in str(observed(kind).description)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (seeming.RareThreshold, "output differs on"),
        (seeming.ClampedLogits, "no routing rule that is tried gives the weights observed: the "),
        (seeming.RoundedWeights, "no routing rule that is tried gives the weights observed: the "),
        (seeming.WeightsInBfloat16, "no routing rule that is tried gives the weights observed: "),
        (seeming.CapacityOfOneExpert, "output differs on 1 x"),
        (seeming.ClampedOutput, "tokens times 1000: row"),
        (seeming.Noise, "two runs on one input differ: it draws random numbers or keeps a state"),
        (seeming.Growing, "no routing rule that is tried gives the weights observed: the nearest"),
        (seeming.WrongBeyond, "output differs on 1 x 200 tokens"),
        (seeming.WrongFarBeyond, "output differs on 1 x 1000 tokens"),
        (seeming.HalfOfSomeLengths, "output differs on 1 x 101 tokens, a number of its code"),
        (seeming.HalfOfManyElements, "output differs on 1 x 4501 tokens, a number of its code"),
        (seeming.HalfFarBeyond, "output differs on 1 x 32768 tokens, the most tokens"),
        (seeming.OneTokenAlone, "output differs on 1 x 1 tokens"),
        (seeming.TokensMeet, "one token changes another's output: tokens meet inside it"),
        (seeming.TokensMeetInTheRouter, "gate.weight multiplies is neither its input nor what"),
        (seeming.State, "a run changes calls: it keeps a state"),
        (seeming.OtherExpert, "output differs on 2 x 12 tokens"),
    ],
)
def test_refused(kind: type[seeming.LookAlike], words: str) -> None:
    with pytest.raises(NoMatch) as raised:
        observed(kind)
    assert words in str(raised.value)


def test_what_lies_below_the_tolerance_is_said_to() -> None:
    text = str(observed(seeming.TinyThreshold))
    assert "agree to 2e-05 of the greatest value; more tokens are refused" in text
