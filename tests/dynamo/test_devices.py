"""Graphs with tensors that are not on a CPU are left unchanged, with a one-sentence message."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import moec
from moec.dynamo.compiler import backend
from moec.dynamo.record import FallbackError, FallbackWarning
from tests.dynamo.modules import Gathered

WORDS = "its tensors are on {}, and this backend has kernels for CPUs alone"


def test_a_model_elsewhere_runs_as_it_is_and_is_counted() -> None:
    model = torch.compile(Gathered().to("meta"), backend="moec", options={"rest": "eager"})
    with torch.no_grad(), pytest.warns(FallbackWarning, match=WORDS.format("meta")):
        y = model(torch.empty(3, 16, device="meta"))
    assert (y.shape, y.device.type) == ((3, 16), "meta")
    stats = moec.stats()
    assert (stats.compilations, stats.blocks) == (1, 0)
    (fallback,) = stats.fallbacks
    assert fallback.where == "the graph"
    assert "moec.compile with target='cuda:sm_80'" in fallback.reason


def on_gpu() -> fx.GraphModule:
    """What Dynamo captures of a router on a GPU, which this machine need not have."""
    graph = fx.Graph()
    choice = graph.call_function(torch.topk, (graph.placeholder("logits"), 2))
    graph.output(choice)
    mode = FakeTensorMode()
    parts = (torch.empty(3, 2, device="meta"), torch.empty(3, 2, device="meta"))
    device = torch.device("cuda:1")
    choice.meta["example_value"] = tuple(FakeTensor(mode, part, device) for part in parts)
    return fx.GraphModule(torch.nn.Module(), graph)


def test_the_gpu_is_named() -> None:
    with pytest.warns(FallbackWarning, match=WORDS.format("cuda:1")):
        run = backend(on_gpu(), [torch.randn(3, 4)], options={"rest": "eager"})
    assert len(run(torch.randn(3, 4))) == 2


def test_strict_refuses() -> None:
    with pytest.raises(FallbackError, match=WORDS.format("cuda:1")):
        backend(on_gpu(), [torch.randn(3, 4)], options={"rest": "eager", "strict": True})
