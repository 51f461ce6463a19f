"""Read-ME: one router for all layers, hoisted; caches and batches use its choices in advance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from docs.systems import Figure, Source
from tests.systems.records import Keep, load, record_of

system = load("23_read_me")
SOURCE = Source(
    number=23,
    title="Read-ME",
    paper="2410.19123",
    example="23_read_me",
    process="autoregressive",
    modalities=("text",),
    adds="The router that reads token ids alone becomes a program of its own (hoist-routers): the "
    "experts of all layers are known before the first runs, for caches and batches.",
    trained="the standard library's text",
)
TOLERANCE = 1e-4  # sums of float32 terms in another order, through a router that may nearly tie
Served = tuple[Any, Any, torch.Tensor, list[float]]


@pytest.fixture(scope="module")
def served() -> Served:
    """The compiled model, the module, requests, and the losses of the router's training."""
    torch.manual_seed(0)
    _, model, losses = system.build(system.SMALL, steps=40)
    windows, _ = system.corpus(system.SMALL, 32)
    compiled = system.serve(model, windows[:2, :7])
    return compiled, model, windows[torch.randperm(len(windows))[:48], :12], losses


def test_every_layer_takes_what_one_router_chooses_once(served: Served) -> None:
    compiled, model, requests, _ = served
    assert [block.name for block in compiled.blocks] == ["layers.0.mlp", "layers.1.mlp"]
    assert {(block.top_k, block.router) for block in compiled.blocks} == {(1, "top-1")}
    assert not [d for d in compiled.declined if d.rule == "hoist-routers"]
    route = compiled.programs["route"].graph
    assert [value.name for value in route.inputs] == ["input_ids"]
    assert {op.origin.split(".")[0] for op in route.ops if "linear" in op.name} == {"router"}
    routed = compiled.programs["routed"].graph
    products = [op.origin for op in routed.ops if "linear" in op.name or "attention" in op.name]
    assert products
    assert not [origin for origin in products if origin.startswith("router")]
    with torch.no_grad():
        expert = model.router(requests).argmax(-1).flatten()
    for choice in compiled.routers(requests).values():
        assert torch.equal(choice["experts"].flatten().long(), expert)


def test_a_cache_that_knows_the_routes_hits_no_less(served: Served) -> None:
    compiled, _, requests, _ = served
    choice = next(iter(compiled.routers(requests).values()))
    uses = choice["experts"].view(len(requests), -1).T.flatten().tolist()
    assert len(set(uses)) == system.SMALL.domains
    for size in range(1, system.SMALL.domains + 1):
        assert system.cache_hits(uses, size, "belady") >= system.cache_hits(uses, size, "lru")
    assert system.cache_hits(uses, 2, "belady") > system.cache_hits(uses, 2, "lru")


def test_batches_by_expert_hold_fewer_experts_and_change_no_output(served: Served) -> None:
    compiled, model, requests, _ = served
    choice = next(iter(compiled.routers(requests).values()))
    trace = choice["experts"].view(len(requests), -1)[:, -1].tolist()
    batches = system.batches_by_expert(trace, 8)
    assert trace.count(trace[batches[0][0]]) == max(map(trace.count, trace))  # the longest queue
    in_order = [range(start, start + 8) for start in range(0, len(trace), 8)]
    assert system.experts_per_batch(trace, batches) < system.experts_per_batch(trace, in_order)
    with torch.no_grad():
        eager = model(requests)
    for batch in batches:
        tokens = requests[batch]
        logits = compiled.routed(compiled.routers(tokens), tokens)
        assert torch.equal(logits, compiled(tokens))  # the same bits as with its routers
        torch.testing.assert_close(logits, eager[batch], rtol=TOLERANCE, atol=TOLERANCE)


def test_experts_are_channels_of_the_dense_layer() -> None:
    """The experts of all channels are the dense layer; of half of them, those of its mask."""
    torch.manual_seed(0)
    dense = system.FeedForward(8, 12)
    x = torch.randn(5, 8)
    with torch.no_grad():
        every = system.expert(dense, torch.ones(12, dtype=torch.bool))
        torch.testing.assert_close(every(x), dense(x))
        mask = torch.arange(12) % 2 == 0
        half = system.expert(dense, mask)
        torch.testing.assert_close(half(x), dense.down(dense.channels(x) * mask))


def test_the_router_learns_the_domains(served: Served) -> None:
    losses = served[3]
    assert sum(losses[-5:]) / 5 < losses[0] / 2


def test_parameters_of_the_paper() -> None:
    router, total, active = system.parameters(system.LLAMA_2_7B)
    assert router == pytest.approx(18e6, rel=0.02)  # two digits in the paper
    assert active == pytest.approx(4.7e9, rel=0.03)  # which counts what experts share once
    assert total == pytest.approx(17e9, rel=0.04)


def test_record(served: Served, keep: Keep) -> None:
    router, total, active = system.parameters(system.LLAMA_2_7B)
    shares = "channels that experts share are not modelled"
    figures = (
        Figure(
            "parameters of the router",
            f"{router / 1e6:.1f} M",
            "18 M",
            "the width of the router is not confirmed",
        ),
        Figure("active for a token", f"{active / 1e9:.2f} B", "4.7 B", shares),
        Figure("all, nothing shared", f"{total / 1e9:.1f} B", "17 B", shares),
        Figure(
            "hits of Belady over LRU",
            "no less, asserted",
            "Table 4: 77.21 over 66.95 % at 4",
            "an order, no figure",
        ),
    )
    keep(record_of(served[0], SOURCE, f"{TOLERANCE:g}", figures))
