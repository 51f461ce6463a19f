"""What a replay predicts is what the store does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moec
from moec.plan.simulation.residency import EVICTIONS, layer_hits
from moec.runtime.artifact.artifact import read
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.expert_store.device import DIRECT
from moec.runtime.expert_store.native import POLICIES, StoreOptions
from moec.runtime.expert_store.start import start_with_slots, store_report

TOKENS, EXPERTS = 150, 12


class Layer(torch.nn.Module):
    """Its input has the logits of the router: the first of each row's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(EXPERTS, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.topk(x[:, :EXPERTS].softmax(-1), 2)
        rows = torch.einsum("th,tkhd->tkd", x, self.w[ids])
        return (rows * weights[..., None]).sum(1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    model = moec.compile(Layer(), (torch.randn(6, 16),), store=True)
    assert len(model.blocks) == 1
    path = tmp_path_factory.mktemp("replay") / "layer.moec"
    model.save(path)
    return path


@pytest.mark.parametrize("slots", [1, 2, 5, 9])
@pytest.mark.parametrize(
    "eviction", [e for e in EVICTIONS if e.policy in POLICIES], ids=lambda e: e.label
)
def test_hits_of_tokens_one_by_one(path, eviction, slots):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((TOKENS, 16)).astype(np.float32)
    x[:, :EXPERTS] += 2 * generator.standard_normal(EXPERTS)
    options = StoreOptions(1, eviction.policy, eviction.half_life)
    model = start_with_slots(read(path), [slots], DIRECT, options)
    for row in x:
        model({"x": row[None]})
    ids = np.argsort(-x[:, :EXPERTS], 1, kind="stable")[:, None, :2].astype(np.int16)
    count = np.zeros(TOKENS, np.int32)
    steps = np.arange(TOKENS, dtype=np.int32)
    trace = RoutingTrace(ids, steps, count.astype(np.uint8), count, np.int32([EXPERTS]))
    hits, visits = layer_hits(trace, 0, slots, eviction)
    counts = store_report(model).counts
    assert (counts.hits, counts.visits) == (hits, visits)
