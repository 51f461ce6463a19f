"""Ids of experts for proofs, however many a token has."""

from __future__ import annotations

import pytest
import torch

from moec.errors import NoMatch
from moec.ir.graph import TensorType, Value
from moec.passes.proof.input_generators import Ids, sample

MANY = Value("ids", TensorType("i64", (5, 8)))


@pytest.mark.parametrize("pattern", ["random", "tied", "one expert", "few experts"])
def test_more_ids_than_experts(pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = sample(MANY, Ids(4, 8), pattern, {}, generator)
    assert ids.shape == (5, 8)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 4


def test_more_different_ids_than_experts() -> None:
    with pytest.raises(NoMatch, match="a token has 8 different ids of 4 experts"):
        sample(MANY, Ids(4, 8, apart=1), "random", {}, torch.Generator())


def test_ids_below_zero() -> None:
    ids = sample(MANY, Ids(9, 8, least=-9), "random", {}, torch.Generator().manual_seed(0))
    assert -9 <= int(ids.min()) < -1
