"""Experts determined by the position of rows, such as tokens chosen by experts; other choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from moec.passes.recognise.forms.stacks.own_rows import FORM
from tests.passes.forms import other_choices
from tests.passes.forms.sizes import E
from tests.passes.recognise.test_recognise import check_text, recognised


@pytest.mark.parametrize(
    "form",
    [other_choices.ChosenTokens, other_choices.StackedTokens, other_choices.TableOfTokens],
)
def test_a_block_from_rows_to_results(form: type[nn.Module], golden: Callable[[str], None]) -> None:
    program, (block,), _ = recognised(form())
    check_text(program, golden)
    assert (block.form, block.experts, block.top_k) == (FORM, E, 1)


def test_one_product_is_no_network() -> None:
    assert recognised(other_choices.OneProduct())[1] == ()


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (
            other_choices.MaskedHeads,
            "topk.default chooses among 4, and the choices are not experts",
        ),
        (other_choices.ChosenRows, "chooses among T rows: it chooses rows, not experts"),
    ],
)
def test_choices_of_what_is_no_expert_are_declined(form: type[nn.Module], why: str) -> None:
    _, blocks, declined = recognised(form())
    assert blocks == ()
    assert any(why in item.reason for item in declined), declined
