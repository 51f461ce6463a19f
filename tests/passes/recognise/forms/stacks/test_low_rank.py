"""Low-rank experts beside a linear layer are blocks, whose result is added to that of the layer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from moec.ir.text import print_graph
from tests.passes.forms import low_rank
from tests.passes.recognise.test_recognise import recognised

ALL = [
    low_rank.LowRank,
    low_rank.ScaledFirst,
    low_rank.ScaledShares,
    low_rank.Stacked,
    low_rank.WeighedInside,
    low_rank.OneDown,
]


@pytest.mark.parametrize("form", ALL)
def test_all_pairs_are_weighed(form: type[nn.Module]) -> None:
    program, (block,), declined = recognised(form())
    assert (block.experts, block.top_k, block.form) == (4, 4, "every expert, weighed")
    assert block.router.endswith(", all")
    assert [op.name for op in program.graph.ops].count("aten.linear.default") == 2 + (
        form is low_rank.OneDown
    )
    assert declined == ()


def test_text(golden: Any) -> None:
    program, *_ = recognised(low_rank.LowRank())
    golden(print_graph(program.graph))


def test_pairs_that_tokens_choose() -> None:
    _, (block,), declined = recognised(low_rank.Chosen())
    assert (block.experts, block.top_k, block.form) == (4, 2, "static loop")
    assert block.router == "softmax, top-2, renormalised"
    assert declined == ()


REFUSED = {
    low_rank.OneAfterTheOther: "its branches read different rows: add",
    low_rank.Unlike: "its experts differ in more than their weights",
}


@pytest.mark.parametrize("form", REFUSED)
def test_refusals(form: type[nn.Module]) -> None:
    _, blocks, declined = recognised(form())
    assert blocks == ()
    assert any(REFUSED[form] in d.reason for d in declined), declined
