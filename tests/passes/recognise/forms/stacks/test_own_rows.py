"""Experts determined by the position of rows, such as tokens chosen by experts; other choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.passes.recognise.forms.stacks.batched import FORM
from tests.passes.forms import other_choices
from tests.passes.forms.sizes import D, E
from tests.passes.recognise.test_recognise import check_text, recognised


@pytest.mark.parametrize(
    "form",
    [other_choices.ChosenTokens, other_choices.StackedTokens, other_choices.TableOfTokens],
)
def test_a_block_from_rows_to_results(form: type[nn.Module], golden: Callable[[str], None]) -> None:
    program, (block,), _ = recognised(form())
    check_text(program, golden)
    assert (block.form, block.experts, block.top_k) == (FORM, E, 1)


class AllGathered(nn.Module):
    """The matrices of all experts are gathered for each token; a threshold weighs the results."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(D, E), nn.Parameter(torch.randn(E, D, D) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        ids = torch.arange(E).expand(x.shape[0], -1)
        weights = torch.where(scores >= 0.4 * scores.amax(-1, keepdim=True), scores, 0.0)
        y = (self.w[ids] @ x[:, None, :, None]).squeeze(-1)
        return (y * weights[..., None]).sum(1)


def test_experts_that_all_rows_read() -> None:
    """No op chooses among them, and no rows belong to one."""
    _, (block,), _ = recognised(AllGathered())
    assert (block.form, block.experts) == ("experts whose weight is not zero", E)


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
