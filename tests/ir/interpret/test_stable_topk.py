"""Whether torch's choice among equal values is the first, which saves a run with that choice."""

from __future__ import annotations

import pytest
import torch

from moec.ir.interpret.stable_topk import FirstOfEquals


@pytest.mark.parametrize("notes_only", [True, False])
def test_no_equal_values(notes_only):
    x = torch.randn(40, 90)
    choices = FirstOfEquals(notes_only=notes_only)
    with choices:
        chosen = x.topk(4)
    assert choices.met != notes_only  # the other mode takes any op that chooses
    assert torch.equal(chosen.indices, x.topk(4).indices)


def test_another_choice_is_noted_and_left():
    x = torch.relu(torch.randn(40, 90) - 1.5)
    with FirstOfEquals() as first:
        right = x.topk(4).indices
    with FirstOfEquals(notes_only=True) as notes:
        chosen = x.topk(4).indices
    assert first.met
    assert notes.met
    assert torch.equal(chosen, x.topk(4).indices)
    assert not torch.equal(chosen, right)
