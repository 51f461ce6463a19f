"""What the cases of a proof cost and cover."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.description import Capacity
from moec.capture.behaviour.proof.cases import cases
from moec.capture.behaviour.proof.probe import Probe
from tests.capture.behaviour.modules import EXPERTS, WIDTH, CountsInNumpy
from tests.capture.behaviour.proof.test_precision import DESCRIPTION


@pytest.mark.parametrize("longest", [257, 1025, 4097])
@pytest.mark.parametrize("factor", [Fraction(5, 4), Fraction(11, 10), Fraction(21, 20)])
def test_a_capacity_is_tried_where_doubles_err_without_many_long_runs(
    factor: Fraction, longest: int
) -> None:
    module = CountsInNumpy()
    probe = Probe(module, Arguments.of((torch.zeros(1, 4, WIDTH),), {}), longest=longest)
    probe.weight_name, probe.columns = "gate.weight", EXPERTS
    probe.description = replace(DESCRIPTION, capacity=Capacity(factor=factor, round_up=True))
    sizes = [math.prod(case.size) for case in cases(probe)]
    assert sum(sizes) < 36_000 + 12 * longest

    def in_doubles(tokens: int) -> int:
        return math.ceil(tokens / EXPERTS * float(factor))

    def exact(tokens: int) -> int:
        return math.ceil(tokens * factor / EXPERTS)

    errs = [n for n in range(1, 4098) if in_doubles(n) != exact(n)]
    assert not errs or min(errs) in sizes
