"""Feed-forward networks that stacked parameters may form: few runs of the module, and a limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moec.capture.behaviour.inference import sources
from moec.capture.behaviour.inference.probe import Probe
from moec.capture.behaviour.layer.arguments import Arguments
from moec.capture.behaviour.layer.parts import stacked_groups
from moec.errors import NoMatch

D = 32


class ListsOfLists(nn.Module):
    """Four lists of two networks can be combined to thousands of networks, and none gives this
    output, which is no sum of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.runs = nn.Linear(D, 2), 0
        self.lists = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(D, 6), nn.Linear(6, D)) for _ in range(2))
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        shares = self.gate(x).softmax(-1)
        parts = [
            shares[..., i, None] * expert(x)
            for pair in self.lists
            for i, expert in enumerate(pair)  # type: ignore[arg-type]
        ]
        return torch.stack(parts).prod(0)


def test_a_module_of_many_stacks_is_refused_after_two_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_BODIES", 30)
    torch.manual_seed(0)
    module = ListsOfLists().eval()
    probe = Probe(module, Arguments.of((torch.randn(2, 6, D),), {}))
    probe.weight_name, probe.columns = "gate.weight", 2
    probe.watch(probe.inputs(1, 12))
    stacks = next(group for group in stacked_groups(module) if len(group) > 4)
    logits = torch.randn(12, 2)
    with pytest.raises(NoMatch, match="stacked parameters form more than 30 feed-forward networks"):
        sources.find_experts(probe, (), stacks, probe.inputs(1, 12), logits, logits)
    assert module.runs == 2
