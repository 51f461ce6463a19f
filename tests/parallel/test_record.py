"""Recorded choices are those of the router."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moec.errors import UsageError
from moec.ir.graph import Program
from moec.ir.text import parse
from moec.parallel.record import record
from tests.passes.parallel.test_plan_parallelism import D, E, K, model


def test_choices_of_two_batches() -> None:
    program = model()
    batches = [torch.randn(3, D), torch.randn(5, D)]
    trace = record(program, [{"x": x} for x in batches])
    logits = torch.cat(batches) @ program.weights["router"].T
    assert np.array_equal(trace.ids[:, 0], logits.topk(K).indices.numpy())
    assert trace.step.tolist() == [0] * 3 + [1] * 5
    assert trace.request.tolist() == list(range(8))
    assert trace.experts.tolist() == [E]


def test_nothing_to_record() -> None:
    with pytest.raises(UsageError, match="no batch"):
        record(model(), [])
    plain = Program(parse("graph main(x: f32[T, 2]) {\n  return x\n}"), {})
    with pytest.raises(UsageError, match="no router is recognised"):
        record(plain, [])
