from __future__ import annotations

import torch

from moec.ir.interpret.stable_topk import FirstOfEquals


def test_of_equal_values_the_first_are_chosen():
    x = torch.relu(torch.randn(40, 90) - 1.5)
    with FirstOfEquals():
        chosen = x.topk(4).indices
    assert torch.equal(chosen, x.sort(descending=True, stable=True).indices[:, :4])
